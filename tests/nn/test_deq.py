"""The DEQ module: what it computes, when it calls the parts of its block, and how it is kept and restored."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from problems import normal, orthogonal
from torch import Tensor, nn

from equilibria import (
    DEQ,
    Anderson,
    Broyden,
    Implicit,
    NonFiniteError,
    Phantom,
    Picard,
    Status,
    Stopping,
    UndeclaredTensorError,
    fixed_point,
)
from equilibria.nn import FrozenDropout

TIGHT = Stopping(rtol=1e-12, atol=1e-14, max_evals=200)
X = normal(0, 5, 3)


class Block(nn.Module):
    """tanh(W z + U x), and a count of the calls of each part."""

    batch_dims: tuple[int | None, ...] = (0,)

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 4).double(), nn.Linear(3, 4).double()
        with torch.no_grad():
            self.inner.weight.copy_(0.7 * orthogonal(4))
            self.outer.weight.copy_(normal(1, 4, 3))
        self.calls = {"prepare": 0, "initial": 0, "forward": 0}

    def prepare(self, x: Tensor) -> tuple[Tensor]:
        self.calls["prepare"] += 1
        return (self.outer(x),)

    def initial(self, x: Tensor) -> Tensor:
        self.calls["initial"] += 1
        return x.new_zeros(len(x), 4)

    def forward(self, z: Tensor, injected: Tensor) -> Tensor:
        self.calls["forward"] += 1
        return torch.tanh(self.inner(z) + injected)


class Plain(nn.Module):
    """A block of the least: no prepare, no initial, no batch_dims."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(0.5).double())

    def forward(self, z: Tensor, x: Tensor, y: Tensor | float = 0.0) -> Tensor:
        return self.rate * torch.sin(z) + x + y


class TestForward:
    def test_parts_are_called_once_per_solve(self) -> None:
        deq = DEQ(Block(), stopping=TIGHT)
        for solve in (1, 2):
            before = deq.block.calls["forward"]  # type: ignore[index]  # pyright: ignore[reportIndexIssue, reportArgumentType]
            _, stats = deq(X)
            calls: Any = deq.block.calls
            assert calls["prepare"] == calls["initial"] == solve
            assert calls["forward"] - before == stats.evaluations > 5

    def test_backward_calls_no_part_but_f(self) -> None:
        block = Block()
        solution = DEQ(block)(X)
        solution.z.sum().backward()
        assert block.calls["prepare"] == block.calls["initial"] == 1

    @pytest.mark.parametrize("adjoint", [Implicit(stopping=TIGHT), Phantom(steps=2)], ids=["implicit", "phantom"])
    def test_equals_a_fixed_point_by_hand(self, adjoint: Any) -> None:
        block = Block()
        options: dict[str, Any] = {"solver": Broyden(), "stopping": TIGHT, "adjoint": adjoint}
        names, parameters = zip(*block.named_parameters(), strict=True)
        assert set(names) == {"inner.weight", "inner.bias", "outer.weight", "outer.bias"}
        x = X.clone().requires_grad_()
        z, stats = DEQ(block, **options)(x)
        found = torch.autograd.grad(z.square().sum(), (x, *parameters))

        def by_hand(z: Tensor, W: Tensor, b: Tensor, injected: Tensor) -> Tensor:
            return torch.tanh(nn.functional.linear(z, W, b) + injected)

        W, b, U, c = parameters
        injected = nn.functional.linear(x, U, c)
        expected_z, expected_stats = fixed_point(by_hand, torch.zeros(5, 4).double(), W, b, injected, **options)
        expected = torch.autograd.grad(expected_z.square().sum(), (x, *parameters))
        assert torch.allclose(z, expected_z, rtol=1e-12, atol=1e-14)
        assert stats.evaluations == expected_stats.evaluations
        for mine, theirs in zip(found, expected, strict=True):
            assert mine.abs().max() > 1e-3
            assert torch.allclose(mine, theirs, rtol=1e-9, atol=1e-11)

    def test_without_prepare_the_inputs_are_the_args(self) -> None:
        block, y = Plain(), normal(4, 5, 3)
        z, _ = DEQ(block, stopping=TIGHT)(X, y)
        assert torch.allclose(z, 0.5 * torch.sin(z) + X + y, rtol=1e-11)
        z, _ = DEQ(block, stopping=TIGHT)(X)
        assert torch.allclose(z, 0.5 * torch.sin(z) + X, rtol=1e-11)

    def test_starts_at_zeros_like_the_first_input(self) -> None:
        seen: list[Tensor] = []

        class Watched(Plain):
            def forward(self, z: Tensor, x: Tensor, y: Tensor | float = 0.0) -> Tensor:
                seen.append(z.detach().clone())
                return super().forward(z, x, y)

        DEQ(Watched())(X)
        assert torch.equal(seen[0], torch.zeros_like(X))

    def test_batch_dims_are_those_of_the_block(self) -> None:
        sizes = []

        class Uneven(Block):
            def forward(self, z: Tensor, injected: Tensor) -> Tensor:
                sizes.append(len(z))
                return super().forward(z, injected)

        x = 1e3 * X  # tanh is flat there: solved at once
        x[1] = 0.1 * X[1]
        deq = DEQ(Uneven(), stopping=TIGHT)
        smaller = deq(x).z
        assert min(sizes) == 1
        sizes.clear()
        deq.block.batch_dims = None  # type: ignore[assignment]  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
        whole = deq(x).z
        assert set(sizes) == {5}
        assert torch.allclose(smaller, whole, rtol=1e-9, atol=1e-11)


class TestWarmStart:
    def test_saves_evaluations_and_changes_no_answer(self) -> None:
        deq = DEQ(Block(), stopping=TIGHT)
        cold = deq(X)
        near = deq(X + 1e-4, z0=cold.z)
        far = deq(X + 1e-4)
        again = deq(X, z0=cold.z)
        assert near.stats.evaluations < far.stats.evaluations
        assert torch.allclose(near.z, far.z, rtol=1e-9, atol=1e-11)
        assert again.stats.evaluations == 1
        assert torch.equal(again.z, cold.z)
        assert deq.block.calls["initial"] == 2  # type: ignore[index]  # pyright: ignore[reportIndexIssue, reportArgumentType]

    def test_passes_no_gradient_to_the_solve_before(self) -> None:
        deq = DEQ(Block(), stopping=TIGHT, adjoint=Implicit(stopping=TIGHT))
        first, second = X.clone().requires_grad_(), X.clone().requires_grad_()
        warm = deq(second, z0=deq(first).z).z
        of_first, of_second = torch.autograd.grad(warm.sum(), (first, second), allow_unused=True)
        assert of_first is None
        assert torch.allclose(of_second, torch.autograd.grad(deq(second).z.sum(), second)[0], rtol=1e-9, atol=1e-11)


class TestStopping:
    def test_of_evaluation_replaces_that_of_training_in_evaluation_mode_alone(self) -> None:
        deq = DEQ(
            Block(), solver=Picard(), stopping=Stopping(rtol=0, max_evals=3), eval_stopping=Stopping(rtol=0, max_evals=9)
        )
        assert deq(X).stats.evaluations == 3
        with torch.no_grad():
            assert deq(X).stats.evaluations == 3
        assert deq.eval()(X).stats.evaluations == 9
        assert deq.train()(X).stats.evaluations == 3

    def test_without_it_both_modes_are_alike(self) -> None:
        deq = DEQ(Block())
        assert torch.equal(deq(X).z, deq.eval()(X).z)

    def test_may_be_exchanged_at_any_time(self) -> None:
        deq = DEQ(Block())
        deq.stopping, deq.solver = Stopping(rtol=0, max_evals=7), Picard()
        deq.adjoint = Implicit(stopping=Stopping(max_evals=1))
        z, stats = deq(X)
        z.sum().backward()
        assert stats.evaluations == 7
        assert stats.backward[0].evaluations == 1


def test_a_sample_that_fails_may_be_returned() -> None:
    class Explodes(nn.Module):
        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return x * z.exp()

    x = torch.tensor([[0.1], [9.0]])
    with pytest.raises(NonFiniteError):
        DEQ(Explodes(), solver=Picard())(x)
    stats = DEQ(Explodes(), solver=Picard(), raise_nonfinite=False)(x).stats
    assert stats.status.tolist() == [Status.CONVERGED, Status.NONFINITE]


class TestKeeping:
    def test_state_dict_round_trip(self) -> None:
        torch.manual_seed(0)
        one, other = DEQ(Block()), DEQ(Block())
        with torch.no_grad():
            one.block.outer.weight.mul_(2.0)  # type: ignore[union-attr,operator]  # pyright: ignore[reportAttributeAccessIssue]
        assert not torch.equal(one(X).z, other(X).z)
        state = one.state_dict()
        assert set(state) == {"block.inner.weight", "block.inner.bias", "block.outer.weight", "block.outer.bias"}
        assert other.load_state_dict(state).missing_keys == []
        assert torch.equal(one(X).z, other(X).z)

    def test_deepcopy_is_independent(self) -> None:
        deq = DEQ(Block(), solver=Broyden(history=3), stopping=TIGHT, eval_stopping=Stopping(rtol=1e-2))
        twin = copy.deepcopy(deq)
        assert torch.equal(deq(X).z, twin(X).z)
        assert (twin.solver, twin.stopping, twin.eval_stopping) == (deq.solver, deq.stopping, deq.eval_stopping)
        before = deq(X).z
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
        assert torch.equal(deq(X).z, before)
        assert not torch.equal(twin(X).z, before)

    def test_save_and_load_whole(self) -> None:
        deq = DEQ(Block(), solver=Anderson(history=3), stopping=TIGHT, adjoint=Phantom(steps=2)).eval()
        file = io.BytesIO()
        torch.save(deq, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        assert isinstance(loaded, DEQ)
        assert (loaded.solver, loaded.stopping, loaded.adjoint) == (deq.solver, deq.stopping, deq.adjoint)
        assert not loaded.training
        assert torch.equal(loaded(X).z, deq(X).z)

    def test_moves_and_converts_as_any_module(self) -> None:
        z, stats = DEQ(Block()).float()(X.float())
        assert z.dtype == torch.float32
        assert stats.converged.all()

    def test_trains(self) -> None:
        """Gradient steps through the equilibrium lower a loss that only its parameters can."""
        deq = DEQ(Block())
        optimizer = torch.optim.SGD(deq.parameters(), lr=0.05)
        target = 0.5 * torch.tanh(normal(9, 5, 4))
        losses = []
        for _ in range(40):
            loss = (deq(X).z - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert losses[-1] < 0.7 * losses[0]

    def test_two_may_share_a_block(self) -> None:
        block = Block()
        deq = nn.ModuleList([DEQ(block), DEQ(block, solver=Picard())])
        assert len(list(deq.parameters())) == 4
        total = deq[0](X).z.sum() + deq[1](X).z.sum()
        total.backward()
        assert block.inner.weight.grad is not None


class TestMisuse:
    @pytest.mark.parametrize("block", [torch.tanh, None, Block])
    def test_needs_a_module(self, block: Any) -> None:
        with pytest.raises(TypeError, match=r"DEQ needs an nn.Module, not a \w+; for a function use fixed_point"):
            DEQ(block)

    @pytest.mark.parametrize("returned", ["tensor", "list"])
    def test_prepare_returns_a_tuple(self, returned: str) -> None:
        class Wrong(Block):
            def prepare(self, x: Tensor) -> Any:
                return self.outer(x) if returned == "tensor" else [self.outer(x)]

        kind = "Tensor" if returned == "tensor" else "list"
        with pytest.raises(TypeError, match=rf"Wrong.prepare returned a {kind}; it must return the tuple.*\(arg,\)"):
            DEQ(Wrong())(X)

    @pytest.mark.parametrize("inputs", [(), (3,), ({"x": X},)])
    def test_needs_initial_where_the_first_input_is_no_tensor(self, inputs: tuple[Any, ...]) -> None:
        with pytest.raises(
            TypeError, match=r"Plain needs a method initial\(\*inputs\) -> z0: its first input is no tensor"
        ):
            DEQ(Plain())(*inputs)

    @pytest.mark.parametrize(
        ("option", "value", "words"),
        [
            ("solver", "anderson", r"solver='anderson' is no solver; give an object such as Anderson\(\)"),
            ("adjoint", Implicit, r"adjoint=<class .*> is no adjoint"),
            ("stopping", 1e-3, r"stopping=0.001 is no stopping"),
        ],
    )
    def test_options(self, option: str, value: Any, words: str) -> None:
        options: dict[str, Any] = {option: value}
        with pytest.raises(TypeError, match=words):
            DEQ(Block(), **options)(X)

    def test_no_keyword_is_swallowed(self) -> None:
        options: dict[str, Any] = {"tol": 1e-3}
        with pytest.raises(TypeError, match="unexpected keyword argument 'tol'"):
            DEQ(Block(), **options)
        with pytest.raises(TypeError, match="unexpected keyword argument 'tol'"):
            DEQ(Block())(X, **options)

    def test_batch_dims_of_the_wrong_length(self) -> None:
        class Wrong(Block):
            batch_dims = (0, None)

        with pytest.raises(ValueError, match="batch_dims has 2 entries for 1 args"):
            DEQ(Wrong())(X)

    def test_a_tensor_that_the_block_does_not_own(self) -> None:
        stray = torch.full((4,), 0.5).double().requires_grad_()

        class Strayed(Block):
            def forward(self, z: Tensor, injected: Tensor) -> Tensor:
                return stray * super().forward(z, injected)

        with pytest.raises(UndeclaredTensorError, match=r"shape \(4,\)"):
            DEQ(Strayed())(X)


def test_dropout_drawn_in_prepare_is_frozen() -> None:
    """One mask for all evaluations of a solve and its backward pass; another in the next solve; none in evaluation."""

    class Dropped(Block):
        batch_dims = (0, 0)

        def __init__(self) -> None:
            super().__init__()
            self.drop = FrozenDropout(0.5)

        def prepare(self, x: Tensor) -> Any:
            injected = self.outer(x)
            return injected, self.drop.mask(injected)

        def forward(self, z: Tensor, injected: Tensor, mask: Tensor | None = None) -> Tensor:
            return torch.tanh(self.inner(self.drop(z, mask)) + injected)

    torch.manual_seed(0)
    deq = DEQ(Dropped(), stopping=Stopping(rtol=1e-8, max_evals=200))
    one, other = deq(X), deq(X)
    assert one.stats.converged.all()
    assert not torch.allclose(one.z, other.z, rtol=1e-3)
    one.z.sum().backward()
    deq.block.batch_dims = (0, None)  # type: ignore[assignment]  # pyright: ignore[reportArgumentType]
    deq.eval()
    assert torch.equal(deq(X).z, deq(X).z)


def test_a_call_may_bring_its_own_stopping():
    deq = DEQ(Block(), stopping=Stopping(max_evals=2)).eval()
    deq.eval_stopping = Stopping(max_evals=3)
    assert deq(X).stats.evaluations == 3
    assert bool(deq(X, stopping=TIGHT).stats.converged.all())
    assert deq(X).stats.evaluations == 3
