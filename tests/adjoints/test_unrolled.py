"""Unrolled differentiation: the derivative of what the solver computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import affine_map, normal, orthogonal, tanh_map
from torch import Tensor

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
