"""Implicit differentiation: what it holds, what it reports, which inputs it takes, and what it refuses."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import affine_map, diagonal_map, normal, orthogonal, residual_of, tanh_map
from torch import Tensor, nn

from equilibria import (
    Anderson,
    Implicit,
    NonFiniteError,
    Phantom,
    Picard,
    Stopping,
    Unrolled,
    fixed_point,
)
from equilibria.stopping import rms

TIGHT = Stopping(rtol=1e-12, atol=1e-14, max_evals=200)
IMPLICIT = Implicit(stopping=TIGHT)
Z0 = torch.zeros(3, 4).double()
each_adjoint = pytest.mark.parametrize(
    "adjoint", [IMPLICIT, Phantom(), Unrolled()], ids=["implicit", "phantom", "unrolled"]
)


def inputs() -> tuple[Tensor, Tensor]:
    return (0.7 * orthogonal(4)).requires_grad_(), normal(0, 3, 4).requires_grad_()


def solve(W: Tensor, x: Tensor, adjoint: Any = IMPLICIT, z0: Tensor = Z0) -> Tensor:
    return fixed_point(tanh_map, z0, W, x, stopping=TIGHT, adjoint=adjoint).z


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.7 * orthogonal(4))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(nn.functional.linear(z, self.weight) + x)


class TestGraph:
    @each_adjoint
    def test_backward_twice_with_retain_graph(self, adjoint: Any) -> None:
        W, x = inputs()
        loss = solve(W, x, adjoint).sum()
        first = torch.autograd.grad(loss, (W, x), retain_graph=True)
        second = torch.autograd.grad(loss, (W, x))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(loss, (W, x))

    @each_adjoint
    def test_an_unused_arg_gets_no_gradient(self, adjoint: Any) -> None:
        W, x = inputs()
        unused = torch.ones(3).double().requires_grad_()
        z = fixed_point(lambda z, W, x, unused: tanh_map(z, W, x), Z0, W, x, unused, stopping=TIGHT, adjoint=adjoint).z
        of_unused, of_x = torch.autograd.grad(z.sum(), (unused, x), allow_unused=True)
        assert of_unused is None or not of_unused.any()
        assert torch.equal(of_x, torch.autograd.grad(solve(W, x, adjoint).sum(), x)[0])

    @each_adjoint
    def test_an_f_without_any_gradient(self, adjoint: Any) -> None:
        """f depends on no input at all, or not on z."""
        a = torch.ones(3, 4).double().requires_grad_()
        z = fixed_point(lambda z, a: torch.full_like(z, 2.0), Z0, a, adjoint=adjoint).z
        assert (
            not z.requires_grad or not torch.autograd.grad(z.sum(), a, allow_unused=True, materialize_grads=True)[0].any()
        )
        z = fixed_point(lambda z, a: 3 * a, Z0, a, adjoint=adjoint).z
        assert torch.allclose(torch.autograd.grad(z.sum(), a)[0], torch.full((3, 4), 3.0).double())

    @each_adjoint
    def test_where_a_solve_ends_at_its_start(self, adjoint: Any) -> None:
        """z0 is the fixed point, or f(z0) is: neither may be returned as it is, and both have their gradient."""
        b = torch.full((2, 3), 2.0).double().requires_grad_()
        for z0 in (torch.full((2, 3), 2.0).double(), torch.zeros(2, 3).double()):
            z = fixed_point(lambda z, b: b + 0.0 * z, z0, b, adjoint=adjoint, solver=Picard()).z
            assert z is not z0
            assert z.data_ptr() != z0.data_ptr() or isinstance(adjoint, Unrolled)
            if not (isinstance(adjoint, Unrolled) and bool(z0.any())):  # nothing was computed there
                assert torch.equal(torch.autograd.grad(z.sum(), b)[0], torch.ones(2, 3).double())

    def test_integer_bool_and_absent_args(self) -> None:
        W, x = inputs()
        index, mask = torch.tensor([2, 0, 1]), torch.tensor([True, False, True, True])

        def f(z: Tensor, W: Tensor, x: Tensor, index: Tensor, mask: Tensor, nothing: None, k: float) -> Tensor:
            assert nothing is None
            return torch.tanh(z @ W.T + k * x[index] * mask)

        args = (W, x, index, mask, None, 2.0)
        z = fixed_point(f, Z0, *args, stopping=TIGHT, adjoint=IMPLICIT).z
        found = torch.autograd.grad(z.square().sum(), (W, x))
        expected = torch.autograd.grad(solve(W, 2.0 * x[index] * mask).square().sum(), (W, x))
        assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-12) for a, b in zip(found, expected, strict=True))
        assert not found[1][:, 1].any()

    def test_z0_has_a_gradient_with_unrolled_alone(self) -> None:
        W, x = inputs()
        for adjoint in (IMPLICIT, Phantom()):
            z0 = Z0.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(solve(W, x, adjoint, z0).sum(), z0, allow_unused=True)
            assert gradient is None
        z0 = Z0.clone().requires_grad_()
        z = fixed_point(
            tanh_map, z0, W, x, solver=Picard(), stopping=Stopping(rtol=0, atol=0, max_evals=3), adjoint=Unrolled()
        ).z
        assert torch.autograd.grad(z.sum(), z0)[0].abs().min() > 0
        z0 = Z0.clone().requires_grad_()
        z = fixed_point(tanh_map, z0, W.detach(), x.detach(), adjoint=IMPLICIT).z
        assert not z.requires_grad

    @each_adjoint
    def test_the_same_layer_twice(self, adjoint: Any) -> None:
        layer, x = Layer(), normal(0, 3, 4).requires_grad_()

        def both(first: Callable[..., Tensor], second: Callable[..., Tensor], *weights: Tensor) -> list[Tensor]:
            inner = fixed_point(first, Z0, x, stopping=TIGHT, adjoint=adjoint).z
            outer = fixed_point(second, Z0, inner + x, stopping=TIGHT, adjoint=adjoint).z
            return list(torch.autograd.grad(outer.square().sum(), (*weights, x)))

        other = Layer()
        of_first, of_second, of_x = both(layer, other, layer.weight, other.weight)
        of_both, of_x_again = both(layer, layer, layer.weight)
        assert torch.allclose(of_both, of_first + of_second, rtol=1e-12, atol=1e-13)
        assert torch.allclose(of_x_again, of_x, rtol=1e-12, atol=1e-13)
        assert of_first.abs().max() > 1e-3

    def test_a_part_of_the_output_alone(self) -> None:
        """The gradient of a state of which one tensor is used: the other's is zero, not undefined."""
        x = normal(0, 3, 4).requires_grad_()

        def f(z: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
            return {"a": 0.5 * z["a"] + x, "b": 0.5 * z["b"] + z["a"]}

        z = fixed_point(f, {"a": Z0, "b": Z0}, x, stopping=TIGHT, adjoint=IMPLICIT).z
        for name, expected in (("a", 2.0), ("b", 4.0)):
            (gradient,) = torch.autograd.grad(z[name].sum(), x, retain_graph=True)
            assert torch.allclose(gradient, torch.full((3, 4), expected).double(), rtol=1e-10)


class TestChangedInBetween:
    """Written over between forward and backward, a value would give the gradient of another function."""

    @pytest.mark.parametrize("which", [0, 1])
    def test_args(self, which: int) -> None:
        args = inputs()
        loss = solve(*args).sum()
        with torch.no_grad():
            args[which].mul_(0.5)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    def test_parameters(self) -> None:
        layer, x = Layer(), normal(0, 3, 4)
        loss = fixed_point(layer, Z0, x, stopping=TIGHT).z.sum()
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        loss.backward(retain_graph=True)
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    @pytest.mark.parametrize("create_graph", [False, True])
    def test_parameters_put_in_place_of_others(self, create_graph: bool) -> None:
        """The gradient is that of the parameters the solve was made with, also if the module holds others by then."""
        layer, x = Layer(), normal(0, 3, 4)
        weight = layer.weight
        loss = fixed_point(layer, Z0, x, stopping=TIGHT, adjoint=IMPLICIT).z.square().sum()
        expected = torch.autograd.grad(loss, weight, create_graph=create_graph, retain_graph=True)
        layer.weight = nn.Parameter(-0.3 * weight.detach())
        found = torch.autograd.grad(loss, weight, create_graph=create_graph, retain_graph=True)
        assert torch.allclose(found[0], expected[0], rtol=1e-12)
        if create_graph:
            second = [
                torch.autograd.grad(first[0].square().sum(), weight, retain_graph=True)[0] for first in (found, expected)
            ]
            assert torch.allclose(second[0], second[1], rtol=1e-12)


class TestMemory:
    def test_holds_the_fixed_point_and_the_args_alone(self) -> None:
        W, x = inputs()
        held: list[Tensor] = []

        def pack(value: Tensor) -> Tensor:
            held.append(value)
            return value

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            z = solve(W, x)
        z.sum().backward()
        allowed = {value.data_ptr() for value in (z, W, x)}
        assert held
        assert {value.data_ptr() for value in held} <= allowed

    @pytest.mark.parametrize("budget", [5, 50])
    def test_no_activation_of_f_outlives_the_solve(self, budget: int) -> None:
        W, x = inputs()
        activations: list[weakref.ref[Tensor]] = []

        def f(z: Tensor, W: Tensor, x: Tensor) -> Tensor:
            hidden = z @ W.T + x
            activations.append(weakref.ref(hidden))
            return torch.tanh(hidden)

        def alive(adjoint: Any) -> int:
            activations.clear()
            stopping = Stopping(rtol=0, atol=0, max_evals=budget)
            solution = fixed_point(f, Z0, W, x, stopping=stopping, solver=Picard(), adjoint=adjoint)
            assert solution.stats.evaluations >= budget
            return sum(activation() is not None for activation in activations)

        assert alive(IMPLICIT) == 0

    def test_memory_held_does_not_grow_with_the_budget_as_it_does_with_unrolled(self) -> None:
        W, x = inputs()

        def held(adjoint: Any, budget: int) -> int:
            sizes: dict[int, int] = {}

            def pack(value: Tensor) -> Tensor:
                sizes[value.data_ptr()] = value.numel()
                return value

            stopping = Stopping(rtol=0, atol=0, max_evals=budget)
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
                solution = fixed_point(tanh_map, Z0, W, x, solver=Picard(), stopping=stopping, adjoint=adjoint)
            return sum(sizes.values()) * bool(solution.z.requires_grad)

        assert held(IMPLICIT, 4) == held(IMPLICIT, 16) > 0
        assert held(Phantom(steps=2), 4) == held(Phantom(steps=2), 16) > held(IMPLICIT, 4)
        assert held(Unrolled(), 16) - held(Unrolled(), 4) >= 12 * Z0.numel()  # an activation for each evaluation


class TestBackwardStatistics:
    """The statistics of a solution tell of the backward solves too, once they have run."""

    def test_one_for_each_backward_pass(self) -> None:
        W, x = inputs()
        stopping = Stopping(rtol=1e-6, max_evals=40, trace=True)
        z, stats = fixed_point(tanh_map, Z0, W, x, stopping=TIGHT, adjoint=Implicit(stopping=stopping))
        assert stats.backward == []
        z.sum().backward(retain_graph=True)
        z.square().sum().backward()
        assert len(stats.backward) == 2
        for backward in stats.backward:
            assert backward.converged.all()
            assert (backward.relative <= 1.01e-6).all()
            assert 1 <= backward.evaluations <= 40
            assert backward.residual.shape == backward.steps.shape == (3,)
            assert backward.trace is not None
            assert torch.allclose(backward.trace[-1], backward.residual, rtol=1e-6)

    def test_count_the_products_with_the_jacobian(self) -> None:
        """At u = 0 the map is known, so that the count starts there: Picard takes u through rate^n."""
        rates = torch.full((1, 3), 0.5).double()
        b = torch.ones(1, 3).double().requires_grad_()
        adjoint = Implicit(solver=Picard(), stopping=Stopping(rtol=0, atol=1e-3, max_evals=100))
        z, stats = fixed_point(diagonal_map, 0 * rates, rates, b, stopping=TIGHT, adjoint=adjoint)
        z.sum().backward()
        # The residual after n steps is 0.5^n: 10 steps to 1e-3.
        assert stats.backward[0].steps.tolist() == [10]
        assert stats.backward[0].evaluations == 10

    def test_say_when_the_budget_was_too_small(self) -> None:
        W, x = inputs()
        z, stats = fixed_point(
            tanh_map, Z0, W, x, stopping=TIGHT, adjoint=Implicit(stopping=Stopping(rtol=1e-12, max_evals=2))
        )
        z.sum().backward()
        assert stats.backward[0].evaluations == 2
        assert not stats.backward[0].converged.any()

    def test_with_create_graph_too(self) -> None:
        """A second derivative passes through both solves: it adds to the statistics of either."""
        W, x = inputs()
        z, stats = fixed_point(tanh_map, Z0, W, x, stopping=TIGHT, adjoint=IMPLICIT)
        (first,) = torch.autograd.grad(z.square().sum(), W, create_graph=True)
        assert len(stats.backward) == 1
        assert stats.backward[0].converged.all()
        assert stats.backward[0].backward == []
        first.square().sum().backward()
        assert len(stats.backward) == 2
        assert len(stats.backward[0].backward) == 1
        assert stats.backward[1].converged.all()
        assert stats.backward[0].backward[0].converged.all()

    def test_empty_where_there_is_nothing_to_solve(self) -> None:
        W, x = inputs()
        stats = fixed_point(tanh_map, Z0, W.detach(), x.detach()).stats
        assert stats.backward == []


class TestNotFinite:
    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_a_loss_that_is_not_finite_is_blamed(self, bad: float) -> None:
        W, x = inputs()
        with pytest.raises(NonFiniteError, match=r"gradient that reaches the fixed point is already inf or NaN.*the loss"):
            (bad * solve(W, x)).sum().backward()

    def test_a_derivative_that_is_not_finite(self) -> None:
        """√z has its fixed point 0 at z0, and no derivative there."""
        a = torch.ones(2, 3).double().requires_grad_()
        z = fixed_point(lambda z, a: a * torch.sqrt(z), torch.zeros(2, 3).double(), a).z
        with pytest.raises(NonFiniteError, match=r"backward solve became inf or NaN in 2 of 2 samples.*I - J.*Phantom\(\)"):
            z.sum().backward()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"solver": "gmres"}, r"solver='gmres' is no solver; give an object such as GMRES\(\)"),
        ({"solver": Anderson}, r"solver=<class .*> is no solver"),
        ({"stopping": 1e-3}, r"stopping=0.001 is no stopping; give an object such as Stopping\(rtol=1e-4\)"),
        ({"tol": 1e-3}, "unexpected keyword argument 'tol'"),
    ],
)
def test_refuses_options_that_are_none(options: dict[str, Any], words: str) -> None:
    with pytest.raises(TypeError, match=words):
        Implicit(**options)


class TestLowPrecision:
    def test_bfloat16_state(self) -> None:
        """Solved and differentiated in bfloat16, with norms in float32, against float64 on the same rounded numbers."""
        W, x = (value.detach().bfloat16().requires_grad_() for value in inputs())
        adjoint = Implicit(stopping=Stopping(rtol=1e-2))
        z, stats = fixed_point(tanh_map, Z0.bfloat16(), W, x, stopping=Stopping(rtol=2e-2), adjoint=adjoint)
        assert z.dtype == torch.bfloat16
        assert stats.residual.dtype == torch.float32
        assert stats.converged.all()
        assert torch.allclose(stats.residual, rms(residual_of(tanh_map, z, W, x)), rtol=1e-5)
        low = torch.autograd.grad(z.sum(), (W, x))
        assert stats.backward[0].residual.dtype == torch.float32
        exact = (W.detach().double().requires_grad_(), x.detach().double().requires_grad_())
        high = torch.autograd.grad(solve(*exact).sum(), exact)
        for mine, theirs in zip(low, high, strict=True):
            assert mine.dtype == torch.bfloat16
            # ‖(I - J)⁻¹‖ <= 1 / 0.3 turns residuals of 2e-2 and 1e-2 into errors of at most 7% and 3%.
            assert (mine.double() - theirs).norm() <= 0.1 * theirs.norm()


class TestAutocast:
    @each_adjoint
    def test_gradient_is_close_to_that_of_float32(self, adjoint: Any) -> None:
        W, x = (value.detach().float().requires_grad_() for value in inputs())

        def gradients() -> tuple[Tensor, ...]:
            stopping = Stopping(rtol=5e-3)
            dtypes = set()

            def f(z: Tensor, W: Tensor, x: Tensor) -> Tensor:
                product = z @ W.T
                dtypes.add(product.dtype)
                return torch.tanh(product + x)

            solution = fixed_point(f, Z0.float(), W, x, stopping=stopping, adjoint=adjoint)
            loss = solution.z.square().sum()
            with torch.autocast("cpu", enabled=False):
                found = torch.autograd.grad(loss, (W, x))
            assert solution.z.dtype == torch.float32
            assert solution.stats.converged.all()
            assert len(dtypes) == 1  # the backward pass evaluates f outside of the mode, but not in another precision
            precisions.append(dtypes.pop())
            return found

        precisions: list[torch.dtype] = []
        full = gradients()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = gradients()
        assert precisions == [torch.float32, torch.bfloat16]
        for a, b in zip(mixed, full, strict=True):
            assert a.dtype == torch.float32
            assert (a - b).norm() <= 0.05 * b.norm()

    @each_adjoint
    @pytest.mark.parametrize("inside_first", [True, False])
    def test_a_weight_used_inside_and_outside_keeps_its_whole_gradient(self, adjoint: Any, inside_first: bool) -> None:
        """Autocast keeps the bfloat16 copy of a weight; one made where no gradient is recorded must not serve outside.

        It keeps those of leaves alone, so that both uses are of the parameter itself and not of a view."""
        layer, x = Layer().float(), normal(0, 3, 4).float()

        def inside() -> Tensor:
            return fixed_point(layer, torch.zeros(3, 4), x, adjoint=adjoint).z.square().sum()

        def outside() -> Tensor:
            return nn.functional.linear(x, layer.weight).float().square().sum()

        def gradient(*losses: Callable[[], Tensor]) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                total = torch.stack([loss() for loss in losses]).sum()
            return torch.autograd.grad(total, layer.weight)[0]

        order = (inside, outside) if inside_first else (outside, inside)
        parts = gradient(inside), gradient(outside)
        assert all(part.abs().max() > 0.1 for part in parts)
        assert torch.allclose(gradient(*order), parts[0] + parts[1], rtol=1e-5, atol=1e-6)


def test_the_layer_is_not_slowed_by_args_without_gradient() -> None:
    """Only what needs a gradient is differentiated: no product with the others is formed."""
    A, b = 0.5 * orthogonal(4), normal(0, 3, 4).requires_grad_()
    z = fixed_point(affine_map, Z0, A, b, stopping=TIGHT, adjoint=IMPLICIT).z
    z.sum().backward()
    assert A.grad is None
    assert b.grad is not None
    assert not A.requires_grad
