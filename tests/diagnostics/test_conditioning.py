"""Extreme singular values of I - J against those of the whole matrix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import PROBLEMS, affine_map, diagonal_map, jacobian, normal, orthogonal, tanh_map
from torch import Tensor, nn

from equilibria import Implicit, Stopping, fixed_point
from equilibria.diagnostics import backward_condition


def dense(J: Tensor) -> tuple[Tensor, Tensor]:
    values = torch.linalg.svdvals(torch.eye(J.shape[-1], dtype=J.dtype) - J)
    return values[..., -1], values[..., 0]


@pytest.mark.parametrize("name", sorted(PROBLEMS))
def test_agrees_with_the_dense_jacobian(name: str) -> None:
    problem = PROBLEMS[name](3, (2, 3), torch.float64)
    smallest, largest = dense(jacobian(problem.f, problem.exact, *problem.args))
    found = backward_condition(problem.f, problem.exact, *problem.args)
    assert found.converged.all()
    assert torch.allclose(found.smallest, smallest, rtol=1e-10)
    assert torch.allclose(found.largest, largest, rtol=1e-10)
    assert torch.allclose(found.condition, largest / smallest, rtol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_few_steps_suffice_where_j_acts_in_few_directions(dtype: torch.dtype) -> None:
    """J of rank 8 in 400 dimensions, far from normal: 25 steps find both ends to 1 %."""
    A = (3 * normal(0, 400, 8) @ normal(1, 8, 400) / 400).to(dtype)
    smallest, largest = dense(A.double())
    found = backward_condition(affine_map, torch.zeros(1, 400, dtype=dtype), A, torch.zeros(1, 400, dtype=dtype))
    assert found.converged.all()
    assert found.products <= 50
    assert float(found.smallest) == pytest.approx(float(smallest), rel=1e-2)
    assert float(found.largest) == pytest.approx(float(largest), rel=1e-2)


def test_a_single_direction_that_is_nearly_singular_is_found() -> None:
    """1 - 1e-6 among 200 rates from 0 to 0.5."""
    rates = torch.linspace(0, 0.5, 200).double().unsqueeze(0)
    rates[0, 100] = 1 - 1e-6
    found = backward_condition(diagonal_map, torch.zeros_like(rates), rates, rates)
    assert found.converged.all()
    assert float(found.condition) == pytest.approx(1e6, rel=1e-2)


def test_out_of_budget_says_so_and_stays_inside() -> None:
    """Random matrices, whose small singular values crowd together."""
    A = 0.9 * normal(0, 3, 200, 200) / 200**0.5

    def f(z: Tensor, A: Tensor) -> Tensor:
        return (A @ z.unsqueeze(2)).squeeze(2)

    smallest, largest = dense(A)
    found = backward_condition(f, torch.zeros(3, 200).double(), A, max_products=20)
    assert not found.converged.any()
    assert found.products.tolist() == [20] * 3
    assert (found.smallest >= smallest).all()
    assert (found.largest <= largest).all()
    full = backward_condition(f, torch.zeros(3, 200).double(), A, max_products=400)
    assert full.converged.all()
    assert torch.allclose(full.smallest, smallest, rtol=1e-2)


def test_a_sample_does_not_depend_on_harder_ones() -> None:
    easy = torch.zeros(60).double()
    easy[:3] = torch.tensor([0.9, -0.8, 0.5])
    easy[3:] = 0.2 * normal(0, 57).clamp(-2, 2)
    hard = torch.linspace(-1, 0.99, 60).double()
    both = backward_condition(diagonal_map, torch.zeros(2, 60).double(), torch.stack((hard, easy)), easy)
    alone = backward_condition(diagonal_map, torch.zeros(1, 60).double(), easy.unsqueeze(0), easy)
    assert both.products[1] == alone.products[0] < both.products[0]
    assert torch.allclose(both.smallest[1], alone.smallest[0], rtol=1e-13, atol=0.0)
    assert torch.allclose(both.largest[1], alone.largest[0], rtol=1e-13, atol=0.0)


@pytest.mark.parametrize("rate", [0.0, 0.5, -1.0])
@pytest.mark.parametrize("size", [1, 3, 30])
def test_spaces_that_close_at_once(rate: float, size: int) -> None:
    """I - J = (1 - rate) I, where every vector is singular and the space never grows by itself."""
    found = backward_condition(lambda z: rate * z, torch.zeros(2, size).double())
    assert found.converged.all()
    assert torch.allclose(found.smallest, torch.tensor(1 - rate).double().expand(2), rtol=1e-12)
    assert torch.allclose(found.condition, torch.ones(2).double(), rtol=1e-12)


def test_singular() -> None:
    rates = torch.tensor([[1.0, 0.5, 0.2], [0.9, 0.5, 0.2]]).double()
    found = backward_condition(diagonal_map, torch.zeros_like(rates), rates, rates)
    assert found.condition[0] > 1e15
    assert float(found.condition[1]) == pytest.approx(8.0)


@pytest.mark.parametrize("weak", [1.0, 0.5, 0.1, 1e-4])
def test_it_bounds_the_error_of_a_gradient(weak: float) -> None:
    """u (I - J) = g solved to a relative residual ε is off by up to ε · condition.

    Here, for a condition of 10⁴ and a g that is small along the weak direction, by all there is.
    """
    rates = torch.tensor([[1 - weak, 0.0]], dtype=torch.float64)
    z = torch.zeros(1, 2).double()
    condition = float(backward_condition(diagonal_map, z, rates, z).condition)
    assert condition == pytest.approx(1 / weak)
    b = torch.zeros(1, 2).double().requires_grad_()
    adjoint = Implicit(stopping=Stopping(rtol=1e-3))
    solved = fixed_point(diagonal_map, z, rates, b, adjoint=adjoint).z
    g = torch.tensor([[1e-3, 1.0]]).double()
    (u,) = torch.autograd.grad(solved, b, g)
    exact = g / (1 - rates)
    error = float((u - exact).norm() / exact.norm())
    assert error <= 1.01e-3 * condition
    assert (error > 0.9) == (weak == 1e-4)


def test_error_of_the_solution_is_within_residual_over_smallest() -> None:
    W, x = 0.9 * orthogonal(6), normal(0, 4, 6)
    exact = fixed_point(tanh_map, torch.zeros_like(x), W, x, stopping=Stopping(rtol=1e-14, max_evals=300)).z
    z, stats = fixed_point(tanh_map, torch.zeros_like(x), W, x, stopping=Stopping(rtol=1e-4, norm=lambda r: r.norm(dim=1)))
    smallest = backward_condition(tanh_map, z, W, x).smallest
    assert ((z - exact).norm(dim=1) <= 1.01 * stats.residual / smallest).all()


def test_of_a_module_under_no_grad() -> None:
    layer = nn.Linear(3, 3).double()
    _, largest = dense(layer.weight.detach())
    with torch.no_grad():
        found = backward_condition(layer, normal(0, 2, 3))
    assert torch.allclose(found.largest, largest.expand(2), rtol=1e-10)
    assert not backward_condition(layer, normal(0, 2, 3)).condition.requires_grad
    assert layer.weight.grad is None


def test_a_jacobian_that_is_not_finite_gives_nan_for_that_sample_alone() -> None:
    z = torch.tensor([[0.0, 0.0], [1.0, 1.0]]).double()
    found = backward_condition(lambda z: z.sqrt(), z)
    assert found.condition[0].isnan()
    assert found.converged.tolist() == [False, True]
    assert float(found.smallest[1]) == pytest.approx(0.5)


@pytest.mark.parametrize("options", [{"max_products": 1}, {"rtol": 0.0}, {"rtol": 1.0}])
def test_refuses_what_makes_no_sense(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"must (be an integer >=|lie between)"):
        backward_condition(torch.sin, torch.zeros(1, 2), **options)
