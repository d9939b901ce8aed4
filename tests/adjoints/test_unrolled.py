"""Unrolled differentiation: the derivative of what the solver computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import affine_map, normal, orthogonal, tanh_map
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from equilibria import GMRES, Anderson, Broyden, Picard, Stopping, Unrolled, fixed_point

# PyTorch's own, the first time that forward mode is used.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

SOLVERS: dict[str, Any] = {
    "picard": Picard(),
    "picard damped": Picard(damping=0.5),
    "anderson": Anderson(history=2),
    "anderson damped": Anderson(history=3, damping=0.5),
    "broyden": Broyden(),
    "broyden limited": Broyden(history=2),
    "line search": Broyden(line_search=3),
}


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
@pytest.mark.parametrize("budget", [2, 3, 6])
def test_is_the_derivative_of_a_solve_that_did_not_converge(solver: Any, budget: int) -> None:
    W, x, z0 = 0.9 * orthogonal(4), normal(0, 2, 4), normal(1, 2, 4)
    stopping = Stopping(rtol=0, atol=0, max_evals=budget)

    def layer(W: Tensor, x: Tensor, z0: Tensor) -> Tensor:
        return fixed_point(tanh_map, z0, W, x, solver=solver, stopping=stopping, adjoint=Unrolled()).z

    inputs = tuple(t.requires_grad_() for t in (W, x, z0))
    assert torch.autograd.gradcheck(layer, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(layer, inputs)


def test_gmres() -> None:
    A, b = 0.9 * orthogonal(5), normal(0, 2, 5)
    stopping = Stopping(rtol=0, atol=0, max_evals=4)

    def layer(A: Tensor, b: Tensor) -> Tensor:
        return fixed_point(
            affine_map, torch.zeros(2, 5).double(), A, b, solver=GMRES(), stopping=stopping, adjoint=Unrolled()
        ).z

    assert torch.autograd.gradcheck(layer, (A.requires_grad_(), b.requires_grad_()), check_forward_ad=True)


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_a_frozen_sample_passes_finite_gradients(solver: Any) -> None:
    """Sample 0 is solved exactly, at once, and stepped on beside a slow one: its differences vanish."""
    rates = torch.tensor([[0.5], [0.9]]).double().expand(2, 3).clone().requires_grad_()
    b = torch.tensor([[0.0, 0.0, 0.0], [1.0, 2.0, 3.0]]).double().requires_grad_()
    stopping = Stopping(rtol=1e-12, atol=1e-14, max_evals=400)
    z, stats = fixed_point(
        lambda z, rates, b: torch.tanh(rates * z) + b, torch.zeros(2, 3).double(), rates, b,
        solver=solver, stopping=stopping, adjoint=Unrolled(),
    )  # fmt: skip
    assert stats.converged.all()
    assert stats.steps[0] == 0
    of_rates, of_b = torch.autograd.grad(z.sum(), (rates, b))
    slope = 1 - torch.tanh(rates * z).square()
    exact = 1 / (1 - rates * slope)
    # Sample 0 was returned as z0, which does not depend on b; sample 1 has the gradient of its fixed point.
    assert torch.equal(of_b[0], torch.zeros(3).double())
    assert torch.allclose(of_b[1], exact[1], rtol=1e-6)
    assert torch.allclose(of_rates[1], (exact * slope * z)[1], rtol=1e-6)


class TestCheckpointed:
    @pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
    @pytest.mark.parametrize("budget", [1, 2, 7, 30])
    def test_solution_and_gradients_are_the_same(self, solver: Any, budget: int) -> None:
        """To the bit: the same steps, computed twice. Samples stop at different steps."""
        W, x, z0 = (t.requires_grad_() for t in (0.9 * orthogonal(4), normal(0, 3, 4), normal(1, 3, 4)))
        stopping = Stopping(rtol=1e-6, max_evals=budget, trace=True)
        found = []
        for adjoint in (Unrolled(), Unrolled(checkpoint=True)):
            z, stats = fixed_point(tanh_map, z0, W, x, solver=solver, stopping=stopping, adjoint=adjoint)
            loss = (z + 0 * tanh_map(z0, W, x)).square().sum()
            found.append([z, *torch.autograd.grad(loss, (W, x, z0)), *vars(stats).values()])
        for plain, checkpointed in zip(*found, strict=True):
            if isinstance(plain, Tensor):
                assert torch.equal(plain, checkpointed)
            else:
                assert plain == checkpointed

    def test_second_derivatives(self) -> None:
        def layer(W: Tensor) -> Tensor:
            stopping = Stopping(rtol=0, atol=0, max_evals=5)
            return fixed_point(
                tanh_map, torch.zeros(2, 3).double(), W, normal(0, 2, 3), stopping=stopping,
                adjoint=Unrolled(checkpoint=True),
            ).z  # fmt: skip

        assert torch.autograd.gradgradcheck(layer, ((0.9 * orthogonal(3)).requires_grad_(),))

    def test_memory_grows_with_the_square_root_of_the_budget(self) -> None:
        def held(adjoint: Unrolled, budget: int) -> int:
            """Values of f's inner layer that are still in memory when the forward pass is over."""
            seen: list[StorageWeakRef] = []

            def f(z: Tensor, x: Tensor) -> Tensor:
                hidden = torch.sin(z)
                seen.append(StorageWeakRef(hidden.untyped_storage()))
                return 0.9 * hidden.square() + x

            x = normal(0, 2, 3).requires_grad_()
            stopping = Stopping(rtol=0, atol=0, max_evals=budget)
            z = fixed_point(f, torch.zeros(2, 3).double(), x, solver=Picard(), stopping=stopping, adjoint=adjoint).z
            assert z.requires_grad
            assert len(seen) == budget
            return sum(not reference.expired() for reference in seen)

        def peak(budget: int) -> int:
            """The most that are in memory at once while the backward pass computes its segments again."""
            seen: list[StorageWeakRef] = []
            most = 0

            def f(z: Tensor, x: Tensor) -> Tensor:
                nonlocal most
                hidden = torch.sin(z)
                seen.append(StorageWeakRef(hidden.untyped_storage()))
                most = max(most, sum(not reference.expired() for reference in seen))
                return 0.9 * hidden.square() + x

            x = normal(0, 2, 3).requires_grad_()
            stopping = Stopping(rtol=0, atol=0, max_evals=budget)
            z0 = torch.zeros(2, 3).double()
            fixed_point(f, z0, x, solver=Picard(), stopping=stopping, adjoint=Unrolled(checkpoint=True)).z.sum().backward()
            assert len(seen) > 1.5 * budget  # nearly all is computed twice
            return most

        for budget in (16, 64, 256):
            assert held(Unrolled(), budget) >= budget - 2
            assert held(Unrolled(checkpoint=True), budget) <= 1
            assert peak(budget) <= budget**0.5 + 2

    def test_not_inside_transforms(self) -> None:
        def loss(x: Tensor) -> Tensor:
            return fixed_point(lambda z, x: 0.5 * z + x, torch.zeros(1, 1), x, adjoint=Unrolled(checkpoint=True)).z.sum()

        with pytest.raises(NotImplementedError, match=r"Unrolled\(checkpoint=True\) does not work inside torch.func"):
            torch.func.grad(loss)(torch.ones(1, 1))


class TestVmap:
    xs, W = normal(5, 4, 2, 3), 0.7 * orthogonal(3)

    @pytest.mark.parametrize(
        "solver", [Picard(), Picard(damping=0.5), Anderson(), Anderson(history=2, damping=0.5), Broyden()], ids=repr
    )
    def test_equals_a_loop(self, solver: Any) -> None:
        """Solution, statistics and gradients are those of the single solves; the evaluations are those of the budget."""
        stopping = Stopping(rtol=1e-5, max_evals=25, trace=True)

        def layer(x: Tensor) -> tuple[Tensor, ...]:
            z, stats = fixed_point(
                tanh_map, torch.zeros(2, 3).double(), self.W, x, solver=solver, stopping=stopping,
                adjoint=Unrolled(),
            )  # fmt: skip
            return z, stats.residual, stats.relative, stats.steps, stats.status

        together = torch.vmap(layer)(self.xs)
        for i, x in enumerate(self.xs):
            for many, one in zip(together, layer(x), strict=True):
                assert torch.allclose(many[i], one, rtol=1e-8, atol=1e-12)
        gradients = torch.vmap(torch.func.grad(lambda x: layer(x)[0].square().sum()))(self.xs)
        for gradient, x in zip(gradients, self.xs, strict=True):
            alone = x.clone().requires_grad_()
            (expected,) = torch.autograd.grad(layer(alone)[0].square().sum(), alone)
            assert torch.allclose(gradient, expected, rtol=1e-7, atol=1e-10)

    def test_refuses_a_solver_that_asks_for_values(self) -> None:
        def layer(x: Tensor) -> Tensor:
            return fixed_point(tanh_map, 0 * x, self.W, x, solver=Broyden(line_search=2), adjoint=Unrolled()).z

        with pytest.raises(NotImplementedError, match=r"under torch.vmap needs a solver .* or Implicit\(\)"):
            torch.vmap(layer)(self.xs)
