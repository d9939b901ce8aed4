"""Parametrised tensors in an equilibrium: computed once per solve, differentiated as if computed at every evaluation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import normal, orthogonal
from torch import Tensor, nn
from torch.nn.utils import parametrizations as torch_parametrizations
from torch.nn.utils import parametrize
from torch.utils.checkpoint import CheckpointError, checkpoint

from equilibria import (
    DEQ,
    Implicit,
    Phantom,
    Picard,
    RandomMapError,
    Stopping,
    UndeclaredTensorError,
    Unrolled,
    fixed_point,
)
from equilibria.nn import computed_once, spectral_norm, stack, weight_drop, weight_norm
from equilibria.regularizers import jacobian_loss

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

TIGHT = Stopping(rtol=1e-13, atol=1e-15, max_evals=200)
X = normal(0, 5, 3)
ADJOINTS: dict[str, Any] = {
    "implicit": Implicit(stopping=TIGHT),
    "phantom": Phantom(steps=3),
    "unrolled": Unrolled(),
}
Wrap = Callable[[nn.Linear], Any]


class Counting(nn.Module):
    """W -> sin(W): a user's own parametrisation, counted."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, weight: Tensor) -> Tensor:
        self.calls += 1
        return torch.sin(weight)


class Buffered(nn.Module):
    """W -> W / (1 + step), where each call in training mode writes to the buffer `step`, as a power iteration does."""

    step: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("step", torch.zeros((), dtype=torch.float64))

    def forward(self, weight: Tensor) -> Tensor:
        if self.training:
            self.step.add_(0.1)
        return weight / (1 + self.step.clone())


def own(make: Callable[[], nn.Module]) -> Wrap:
    def wrap(linear: nn.Linear) -> nn.Module:
        return parametrize.register_parametrization(linear, "weight", make())

    return wrap


WRAPS: dict[str, Wrap] = {
    "sin": own(Counting),
    "identity": own(nn.Identity),
    "torch weight norm": torch_parametrizations.weight_norm,
    "torch spectral norm": lambda linear: torch_parametrizations.spectral_norm(linear).eval(),
    "orthogonal": torch_parametrizations.orthogonal,
    "weight norm": weight_norm,
    "spectral norm": lambda linear: spectral_norm(linear, bound=0.7).eval(),
    "two": lambda linear: own(Counting)(weight_norm(linear)),
}
"""All deterministic, so that the same block may be evaluated without computing them once."""


class Block(nn.Module):
    """tanh(0.6 W z + U x + c): W and U parametrised, U in `prepare`, and calls counted."""

    batch_dims: tuple[int | None, ...] | None = (0,)
    inner: Any
    outer: Any

    def __init__(self, wrap: Wrap) -> None:
        super().__init__()
        inner, outer = nn.Linear(4, 4).double(), nn.Linear(3, 4).double()
        with torch.no_grad():
            inner.weight.copy_(0.9 * orthogonal(4) + 0.05 * normal(2, 4, 4))
            outer.weight.copy_(normal(1, 4, 3))
            inner.bias.fill_(0.1)
            outer.bias.fill_(-0.2)
        self.inner, self.outer = wrap(inner), wrap(outer)
        self.calls = 0

    def prepare(self, x: Tensor) -> tuple[Any, ...]:
        return (self.outer(x),)

    def initial(self, x: Tensor) -> Tensor:
        return x.new_zeros(len(x), 4)

    def forward(self, z: Tensor, u: Tensor) -> Tensor:
        self.calls += 1
        return torch.tanh(0.6 * self.inner(z) + u)


def parametrization(block: nn.Module, layer: str = "inner") -> Any:
    """The first parametrisation of a layer's weight."""
    owner: Any = block.get_submodule(layer)
    return owner.parametrizations.weight[0]


def solver(block: nn.Module, adjoint: Any = None, **options: Any) -> DEQ:
    return DEQ(block, stopping=TIGHT, adjoint=adjoint or ADJOINTS["implicit"], **options)


def grads(loss: Tensor, module: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(module.parameters())))


def close(found: Any, expected: Any) -> bool:
    return all(torch.allclose(a, b, rtol=1e-9, atol=1e-11) for a, b in zip(found, expected, strict=True))


class TestOnce:
    @pytest.mark.parametrize("adjoint", ADJOINTS)
    def test_per_solve_and_never_in_the_backward_pass(self, adjoint: str) -> None:
        block = Block(own(Counting))
        deq = solver(block, ADJOINTS[adjoint])
        start = parametrization(block).calls, parametrization(block, "outer").calls
        for solve in (1, 2):
            z, stats = deq(X)
            z.square().sum().backward()
            assert parametrization(block).calls - start[0] == solve
            assert parametrization(block, "outer").calls - start[1] == solve
            assert stats.evaluations > 5
            assert block.inner.parametrizations.weight.original.grad.abs().max() > 0

    def test_in_evaluation_mode_and_without_gradients(self) -> None:
        block = Block(own(Counting))
        start = parametrization(block).calls
        with torch.no_grad():
            solver(block).eval()(X)
        assert parametrization(block).calls == start + 1

    def test_in_a_stack(self) -> None:
        block = Block(own(Counting))
        start = parametrization(block).calls
        stack(block, 7, X).sum().backward()
        assert parametrization(block).calls == start + 1

    def test_when_solve_is_called_with_args(self) -> None:
        block = Block(own(Counting))
        start = parametrization(block).calls
        solver(block).solve(torch.zeros(5, 4).double(), *block.prepare(X))
        assert parametrization(block).calls == start + 1

    @pytest.mark.parametrize("context", [computed_once, lambda block: parametrize.cached()], ids=["ours", "torch"])
    def test_in_all_of_a_context(self, context: Any) -> None:
        """Preparation, two solves with their backward passes, and a penalty share one value."""
        block = Block(own(Counting))
        deq = solver(block)
        expected = grads(2 * deq(X).z.square().sum(), block)
        start = parametrization(block).calls, parametrization(block, "outer").calls
        with context(block):
            args = block.prepare(X)
            z0 = block.initial(X)
            z = deq.solve(z0, *args).z
            found = grads(z.square().sum() + deq.solve(z0, *args).z.square().sum(), block)
            assert jacobian_loss(block, z, *args) > 0
            again = block.inner.weight
            assert again is block.inner.weight
        assert (parametrization(block).calls, parametrization(block, "outer").calls) == (start[0] + 1, start[1] + 1)
        assert close(found, expected)
        assert again is not block.inner.weight

    def test_a_backward_pass_leaves_nothing_in_the_cache_of_torch(self) -> None:
        block = Block(own(Counting))
        z = solver(block)(X).z
        with parametrize.cached():
            z.sum().backward()
            (gradient,) = torch.autograd.grad(block.inner.weight.sum(), block.inner.parametrizations.weight.original)
        assert torch.allclose(gradient, torch.cos(block.inner.parametrizations.weight.original))

    def test_power_iteration_advances_once_per_training_solve(self) -> None:
        block, twin = (Block(lambda linear: torch_parametrizations.spectral_norm(linear)) for _ in range(2))
        twin.load_state_dict(block.state_dict())
        deq = solver(block)
        for _ in range(3):
            deq(X).z.sum().backward()
            assert twin.inner.weight is not None  # read once
            assert torch.equal(parametrization(block)._u, parametrization(twin)._u)
        before = parametrization(block)._u.clone()
        deq.eval()(X).z.sum().backward()
        assert torch.equal(parametrization(block)._u, before)

    def test_calls_of_the_block_are_those_of_the_statistics(self) -> None:
        """The block itself is called, not a copy: what it writes to itself stays."""
        block = Block(weight_norm)
        _, stats = solver(block)(X)
        assert block.calls == stats.evaluations


class TestGradients:
    @pytest.mark.parametrize("wrap", WRAPS)
    @pytest.mark.parametrize("adjoint", ADJOINTS)
    def test_equal_those_of_computing_at_every_evaluation(self, wrap: str, adjoint: str) -> None:
        block = Block(WRAPS[wrap])
        x = X.clone().requires_grad_()
        z, stats = solver(block, ADJOINTS[adjoint])(x)
        found = torch.autograd.grad(z.square().sum(), [x, *block.parameters()])
        # fixed_point takes the block as it is: every evaluation computes its parametrised tensors.
        options: dict[str, Any] = {"stopping": TIGHT, "adjoint": ADJOINTS[adjoint], "batch_dims": (0,)}
        other, other_stats = fixed_point(block, block.initial(x), *block.prepare(x), **options)
        expected = torch.autograd.grad(other.square().sum(), [x, *block.parameters()])
        assert torch.equal(z, other)
        assert stats.evaluations == other_stats.evaluations
        assert all(gradient.abs().max() > 1e-6 for gradient in found)
        assert close(found, expected)

    @pytest.mark.parametrize("wrap", WRAPS)
    def test_of_a_stack_equal_those_of_a_loop(self, wrap: str) -> None:
        block = Block(WRAPS[wrap])
        z = block.initial(X)
        for _ in range(6):
            z = block(z, *block.prepare(X))
        found = stack(block, 6, X)
        assert torch.allclose(found, z, rtol=1e-14)
        assert close(grads(found.square().sum(), block), grads(z.square().sum(), block))

    @pytest.mark.parametrize("wrap", ["weight norm", "spectral norm", "sin"])
    def test_first_and_second_derivatives(self, wrap: str) -> None:
        block = Block(WRAPS[wrap])
        names, values = zip(*block.named_parameters(), strict=True)
        deq = solver(block)

        def solved(*values: Tensor) -> Tensor:
            parameters = {f"block.{name}": value for name, value in zip(names, values, strict=True)}
            return torch.func.functional_call(deq, parameters, (X[:2],)).z.sum(1)

        inputs = [value.detach().clone().requires_grad_() for value in values]
        assert torch.autograd.gradcheck(solved, inputs)
        assert torch.autograd.gradgradcheck(solved, inputs)

    @pytest.mark.parametrize("adjoint", ["phantom", "unrolled"])
    def test_second_derivatives_of_recorded_steps(self, adjoint: str) -> None:
        """Those of the same steps, taken by hand with weights that are computed at each of them."""
        block = Block(weight_norm)
        options: dict[str, Any] = {"solver": Picard(), "adjoint": ADJOINTS[adjoint]}
        deq = DEQ(block, stopping=TIGHT if adjoint == "phantom" else Stopping(rtol=0, max_evals=5), **options)
        z = deq(X).z
        expected, steps = (z.detach(), 3) if adjoint == "phantom" else (block.initial(X), 4)
        for _ in range(steps):
            expected = block(expected, *block.prepare(X))
        assert torch.allclose(z, expected, rtol=1e-11)
        second = []
        for output in (z, expected):
            first = torch.autograd.grad(output.exp().sum(), list(block.parameters()), create_graph=True)
            second.append(grads(torch.cat([g.flatten() for g in first]).square().sum(), block))
        assert all(gradient.abs().max() > 1e-3 for gradient in second[0])
        assert close(*second)

    def test_of_an_earlier_solve_after_a_later_one(self) -> None:
        """The parametrisation writes to its buffer in each solve; the solve before needs nothing of it any more."""
        block = Block(own(Buffered))
        deq = solver(block)
        alone = grads(deq(X).z.square().sum(), block)
        for name in ("inner", "outer"):
            parametrization(block, name).step.sub_(0.1)
        first = deq(X).z
        second = deq(X).z
        assert not torch.allclose(first, second)
        assert close(grads(first.square().sum(), block), alone)

    def test_follow_the_weights_of_an_optimizer(self) -> None:
        block = Block(weight_norm)
        deq = solver(block)
        optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
        losses = []
        for _ in range(20):
            loss = (deq(X).z - 0.3).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert losses[-1] < 0.7 * losses[0]

    def test_of_a_parametrised_buffer_and_a_shared_layer(self) -> None:
        class Twice(nn.Module):
            scale: Tensor

            def __init__(self) -> None:
                super().__init__()
                self.first = own(Counting)(nn.Linear(3, 3).double())
                self.second = self.first
                self.register_buffer("scale", torch.full((3,), 0.4).double())
                parametrize.register_parametrization(self, "scale", Counting())

            def forward(self, z: Tensor, x: Tensor) -> Tensor:
                return torch.tanh(self.scale * self.second(self.first(z)) + x)

        block: Any = Twice()
        calls = block.first.parametrizations.weight[0], block.parametrizations.scale[0]
        start = [counter.calls for counter in calls]
        z = solver(block)(X).z
        assert [counter.calls for counter in calls] == [n + 1 for n in start]
        other = torch.zeros_like(X)
        for _ in range(80):
            other = block(other, X)
        expected = grads(other.square().sum(), block)
        assert close(grads(z.square().sum(), block), expected)


class TestTransforms:
    def test_grad_of_a_functional_call(self) -> None:
        block = Block(weight_norm)
        deq = solver(block)
        parameters = dict(deq.named_parameters())

        def loss(parameters: dict[str, Tensor]) -> Tensor:
            return torch.func.functional_call(deq, parameters, (X,)).z.square().sum()

        moved = {name: value.detach() + 0.05 for name, value in parameters.items()}
        found = torch.func.grad(loss)(moved)
        with torch.no_grad():
            for value in parameters.values():
                value.add_(0.05)
        expected = grads(deq(X).z.square().sum(), deq)
        assert close([found[name] for name in parameters], expected)

    @pytest.mark.parametrize("norm", [weight_norm, lambda linear: spectral_norm(linear, bound=0.7)])
    def test_vmap_over_an_ensemble_in_training(self, norm: Any) -> None:
        members: list[Any] = [solver(Block(norm)) for _ in range(3)]
        for i, member in enumerate(members):
            with torch.no_grad():
                for name, value in member.named_parameters():
                    value.mul_(1 + 0.1 * i * ("original" in name))
        parameters, buffers = torch.func.stack_module_state(members)
        base = solver(Block(norm))

        def one(parameters: Any, buffers: Any) -> Tensor:
            return torch.func.functional_call(base, (parameters, buffers), (X,)).z

        found = torch.func.vmap(one)(parameters, buffers)
        expected = torch.stack([member(X).z for member in members])
        assert torch.allclose(found, expected, rtol=1e-9, atol=1e-11)

    def test_hessian_through_weight_norm(self) -> None:
        """Forward mode over reverse mode, which torch's weight norm does not have."""
        block = Block(weight_norm)
        deq = solver(block)
        name = "block.inner.parametrizations.weight.original0"
        g = dict(deq.named_parameters())[name].detach()

        def loss(g: Tensor) -> Tensor:
            return torch.func.functional_call(deq, {name: g}, (X,)).z.exp().sum()

        found = torch.func.hessian(loss)(g).reshape(4, 4)
        second: Any = torch.autograd.functional.hessian(loss, g)
        expected = second.reshape(4, 4)
        step = 1e-4 * torch.eye(4, dtype=g.dtype)[0].reshape(g.shape)
        differences = (torch.func.grad(loss)(g + step) - torch.func.grad(loss)(g - step)) / 2e-4
        assert torch.allclose(found, expected, rtol=1e-8, atol=1e-10)
        assert torch.allclose(found[0], differences.flatten(), rtol=1e-6, atol=1e-8)


class TestNested:
    class Outer(nn.Module):
        """An equilibrium of which every evaluation solves an inner one; both have parametrised weights."""

        def __init__(self, adjoint: Any) -> None:
            super().__init__()
            self.inner = solver(Block(own(Counting)), adjoint)
            self.mix = own(Counting)(nn.Linear(4, 3).double())

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return x + 0.3 * self.mix(self.inner(z).z)

    @pytest.mark.parametrize("adjoint", ["implicit", "unrolled"])
    def test_computed_once_and_differentiated_right(self, adjoint: str) -> None:
        block = self.Outer(ADJOINTS[adjoint])
        counters = [child for child in block.modules() if isinstance(child, Counting)]
        start = [counter.calls for counter in counters]
        z, stats = solver(block, ADJOINTS[adjoint])(X[:2])
        found = grads(z.square().sum(), block)
        assert stats.evaluations > 5
        assert [counter.calls for counter in counters] == [n + 1 for n in start]
        assert len(counters) == 3

        reference = X[:2]
        for _ in range(40):
            inner = stack(block.inner.block, 60, reference)
            reference = X[:2] + 0.3 * block.mix(inner)
        assert torch.allclose(z, reference, rtol=1e-10)
        expected = grads(reference.square().sum(), block)
        assert all(torch.allclose(a, b, rtol=1e-7, atol=1e-9) for a, b in zip(found, expected, strict=True))

    def test_inner_solve_alone_after_the_outer(self) -> None:
        block = self.Outer(ADJOINTS["implicit"])
        before = block.inner(X[:2]).z
        solver(block)(X[:2]).z.sum().backward()
        assert torch.equal(block.inner(X[:2]).z, before)


class TestSafety:
    def test_an_exception_inside_f_leaves_nothing_behind(self) -> None:
        class Failing(Block):
            fail = True

            def forward(self, z: Tensor, u: Tensor) -> Tensor:
                out = super().forward(z, u)
                if self.fail and self.calls == 3:
                    raise ZeroDivisionError("third evaluation")
                return out

        block = Failing(own(Counting))
        before = {name: type(child) for name, child in block.named_modules()}
        with pytest.raises(ZeroDivisionError):
            solver(block)(X)
        assert {name: type(child) for name, child in block.named_modules()} == before
        assert parametrize._cache == {}
        assert not parametrize._cache_enabled
        start = parametrization(block).calls
        assert torch.equal(block.inner.weight, torch.sin(block.inner.parametrizations.weight.original))
        assert parametrization(block).calls == start + 1
        block.fail = False
        assert solver(block)(X).stats.converged.all()

    def test_an_exception_in_prepare_leaves_nothing_behind(self) -> None:
        class Failing(Block):
            def prepare(self, x: Tensor) -> tuple[Any, ...]:
                raise ZeroDivisionError

        block = Failing(own(Counting))
        for run in (lambda: solver(block)(X), lambda: stack(block, 3, X)):
            with pytest.raises(ZeroDivisionError):
                run()
            start = parametrization(block).calls
            assert block.inner.weight is not block.inner.weight
            assert parametrization(block).calls == start + 2

    def test_a_tensor_that_was_not_passed_is_still_found(self) -> None:
        stray = torch.full((4,), 0.5).double().requires_grad_()

        class Strayed(Block):
            def forward(self, z: Tensor, u: Tensor) -> Tensor:
                return stray * super().forward(z, u)

        with pytest.raises(UndeclaredTensorError, match=r"shape \(4,\)"):
            solver(Strayed(weight_norm))(X)

    def test_random_numbers_in_f_are_still_found(self) -> None:
        class Random(Block):
            def forward(self, z: Tensor, u: Tensor) -> Tensor:
                return nn.functional.dropout(super().forward(z, u), 0.5)

        with pytest.raises(RandomMapError, match="FrozenDropout"):
            solver(Random(weight_norm))(X)

    def test_ordinary_dropout_is_still_refused(self) -> None:
        block = Block(weight_norm)
        block.extra = nn.Dropout(0.5)
        with pytest.raises(RandomMapError, match=r"Dropout\(p=0.5\) at block.extra"):
            solver(block)(X)

    def test_batch_dims_are_those_of_the_block(self) -> None:
        sizes = []

        class Uneven(Block):
            def forward(self, z: Tensor, u: Tensor) -> Tensor:
                sizes.append(len(z))
                return super().forward(z, u)

        x = 1e3 * X  # tanh is flat there: solved at once
        x[1] = 0.1 * X[1]
        block = Uneven(weight_norm)
        smaller = solver(block)(x).z
        assert min(sizes) == 1
        block.batch_dims = None
        sizes.clear()
        assert torch.allclose(solver(block)(x).z, smaller, rtol=1e-9, atol=1e-11)
        assert set(sizes) == {5}

    @pytest.mark.parametrize("wrap", [weight_norm, weight_drop])
    @pytest.mark.parametrize("batch", [4, 5])
    def test_a_checkpoint_inside_the_block_never_gives_wrong_gradients(self, wrap: Any, batch: int) -> None:
        """Its recomputation does not see the values of the solve; with batch 4 all shapes agree by chance."""

        class Checkpointed(Block):
            def forward(self, z: Tensor, u: Tensor) -> Tensor:
                inner: Any = checkpoint(self.inner, z, use_reentrant=False)
                return torch.tanh(0.3 * inner + u)

        x = normal(3, batch, 3)
        z = solver(Checkpointed(wrap))(x).z
        with pytest.raises(CheckpointError, match="more tensors during recomputation"):
            z.sum().backward()

    def test_a_checkpoint_around_the_layer_computes_again_what_it_computed(self) -> None:
        torch.manual_seed(0)
        deq = solver(Block(weight_drop))
        torch.manual_seed(1)
        expected = grads(deq(X).z.square().sum(), deq)
        torch.manual_seed(1)
        z: Any = checkpoint(lambda x: deq(x).z, X, use_reentrant=False)
        assert close(grads(z.square().sum(), deq), expected)
