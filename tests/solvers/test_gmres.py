"""GMRES against its definition."""

from __future__ import annotations

import pytest
import torch
from problems import Counted, affine_map, normal, normal_matrix, orthogonal
from steps import iterates
from torch import Tensor

from equilibria import GMRES, Implicit, Status, Stopping, fixed_point


def best_in_krylov(A: Tensor, b: Tensor, z0: Tensor, k: int) -> Tensor:
    """One sample (D,): argmin ‖b - (I - A) z‖ over z0 + span(r, A r, ..., A^(k-1) r), by least squares."""
    M = torch.eye(len(A)).double() - A
    r = b - M @ z0
    space = torch.stack([torch.linalg.matrix_power(A, i) @ r for i in range(k)], dim=1)
    space = torch.linalg.qr(space)[0]
    return z0 + space @ torch.linalg.lstsq(M @ space, r.unsqueeze(1), driver="gelsd").solution.squeeze(1)


def test_each_step_is_the_best_in_the_krylov_space() -> None:
    A, b, z0 = 1.3 * orthogonal(7), normal(1, 2, 7), normal(2, 2, 7)  # far from a contraction
    found = iterates(GMRES(restart=10), lambda z: affine_map(z, A, b), z0, 5)
    for k in range(1, 6):
        for i in range(2):
            assert torch.allclose(found[k][i], best_in_krylov(A, b[i], z0[i], k), rtol=1e-9, atol=1e-9), f"step {k}"


def test_restarts_from_where_it_is() -> None:
    """After `restart` steps and one evaluation, the next cycle is the best in the Krylov space of the present z."""
    A, b = 0.9 * orthogonal(7), normal(1, 1, 7)
    found = iterates(GMRES(restart=2), lambda z: affine_map(z, A, b), 0 * b, 5)
    assert torch.equal(found[3], found[2])
    for step, origin, k in ((2, 0, 2), (4, 3, 1), (5, 3, 2)):
        expected = best_in_krylov(A, b[0], found[origin][0], k)
        assert torch.allclose(found[step][0], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", [1, 2, 5, 8])
def test_solves_within_d_steps(size: int) -> None:
    """As the solver of the backward pass, where f(0) is known beforehand: d evaluations. In front of a user, one for f(z0)
    and one to measure the residual besides."""
    A, b = 1.2 * orthogonal(size, seed=size), normal(1, 3, size).requires_grad_()
    stopping = Stopping(rtol=1e-9, max_evals=100)
    adjoint = Implicit(solver=GMRES(), stopping=stopping)
    z, stats = fixed_point(
        affine_map, torch.zeros(3, size).double(), A, b, solver=GMRES(), stopping=stopping, adjoint=adjoint
    )
    M = torch.eye(size).double() - A
    assert stats.converged.all()
    assert (stats.steps <= size).all()
    assert stats.evaluations <= size + 2
    assert torch.allclose(z, torch.linalg.solve(M, b.mT).mT, rtol=1e-7, atol=1e-7)
    (gradient,) = torch.autograd.grad(z.sum(), b)
    assert stats.backward[0].evaluations <= size
    assert torch.allclose(gradient, torch.linalg.solve(M.mT, torch.ones(size, 1).double()).mT.expand(3, -1), rtol=1e-7)


def test_an_exact_solution_ends_the_space() -> None:
    """Two eigenvalues: after two steps the Krylov space cannot grow, and further steps (for a neighbour) change nothing."""
    A = torch.diag(torch.tensor([0.5, 0.5, -0.5, -0.5, 0.1, 0.9])).double()
    b = torch.tensor([[1.0, 2.0, 3.0, 4.0, 0.0, 0.0], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]]).double()
    z, stats = fixed_point(affine_map, 0 * b, A, b, solver=GMRES(), stopping=Stopping(rtol=1e-12))
    assert stats.steps.tolist() == [2, 4]
    assert torch.allclose(z, b / (1 - A.diagonal()), rtol=1e-11)
    # The same with steps after the end: nothing is found there, and nothing is lost.
    more = iterates(GMRES(), lambda z: affine_map(z, A, b), 0 * b, 5)
    assert torch.allclose(more[-1], b / (1 - A.diagonal()), rtol=1e-11)


@pytest.mark.parametrize("rtol", [1e-3, 1e-8])
def test_refuses_a_map_that_is_not_affine(rtol: float) -> None:
    with pytest.raises(ValueError, match=r"GMRES solves affine maps.*not affine.*use Anderson\(\) or Broyden\(\)"):
        fixed_point(lambda z: 2 * torch.cos(3 * z), torch.zeros(2, 3), solver=GMRES(), stopping=Stopping(rtol=rtol))


@pytest.mark.parametrize("budget", [1, 2, 4, 7])
def test_respects_the_budget(budget: int) -> None:
    A, b = normal_matrix(torch.linspace(-0.9, 0.9, 12)), normal(1, 2, 12)
    f = Counted(affine_map)
    stopping = Stopping(rtol=0, atol=0, max_evals=budget)
    z, stats = fixed_point(f, 0 * b, A, b, solver=GMRES(restart=3), stopping=stopping)
    assert stats.evaluations == f.calls
    assert f.calls <= budget
    assert stats.status.tolist() == [Status.EXHAUSTED] * 2
    residual = (affine_map(z, A, b) - z).square().mean(1).sqrt()
    assert torch.allclose(stats.residual, residual, rtol=1e-12)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_a_zero_fixed_point_is_affine_too(rate: float) -> None:
    """Where the solution is zero, rounding is large beside f(z); that does not make the map another."""
    z0 = normal(0, 5, 4).float()
    z, stats = fixed_point(lambda z: rate * z, z0, solver=GMRES())
    assert stats.evaluations <= 50
    # f(origin + v) - f(origin) is rounded to the size of z0, and an error in the residual counts 1 / (1 - rate) times.
    assert z.abs().max() < 4 * torch.finfo(torch.float32).eps * float(z0.norm(dim=1).max()) / (1 - rate)


def test_relative_residual_is_zero_at_an_exact_zero() -> None:
    stats = fixed_point(lambda z: 0.5 * z, torch.zeros(2, 3), solver=GMRES()).stats
    assert stats.residual.tolist() == [0.0, 0.0]
    assert stats.relative.tolist() == [0.0, 0.0]
    assert stats.converged.all()
