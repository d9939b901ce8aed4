"""GMRES against its definition."""

from __future__ import annotations

import pytest
import torch
from problems import Counted, affine_map, normal, normal_matrix, orthogonal
from steps import iterates
from torch import Tensor

from equilibria import GMRES, Implicit, Status, Stopping, Unrolled, fixed_point
from equilibria.iterate import BudgetedMap, iterate
from equilibria.stopping import rms


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
    found = iterates(GMRES(restart=2, keep=0), lambda z: affine_map(z, A, b), 0 * b, 5)
    assert torch.equal(found[3], found[2])
    for step, origin, k in ((2, 0, 2), (4, 3, 1), (5, 3, 2)):
        expected = best_in_krylov(A, b[0], found[origin][0], k)
        assert torch.allclose(found[step][0], expected, rtol=1e-9, atol=1e-9)


def nearly_singular(size: int) -> Tensor:
    """One eigenvalue at 1 - 1e-4, the others far from 1."""
    return normal_matrix(torch.cat((torch.linspace(-0.5, 0.9, size - 1), torch.tensor([1 - 1e-4]))))


class TestCorrectionsKept:
    @pytest.mark.parametrize("keep", [1, 2])
    def test_each_step_is_the_best_in_the_wider_space(self, keep: int) -> None:
        """At a restart: the corrections e of the last `keep` cycles, and the Krylov space of the residual there under
        M = I - A, where what lies in the span of M e is taken out of each vector."""
        A, b = 0.9 * orthogonal(12), normal(1, 1, 12)
        M = torch.eye(12).double() - A
        found = [z[0] for z in iterates(GMRES(restart=2, keep=keep), lambda z: affine_map(z, A, b), 0 * b, 12)]
        origins = [found[0], found[2], found[5], found[8], found[11]]  # a restart is a step that stays where it is
        for cycle in range(1, 4):
            origin, r = origins[cycle], b[0] - M @ origins[cycle]
            kept = [origins[i] - origins[i - 1] for i in range(cycle, max(0, cycle - keep), -1)]
            taken_out = torch.linalg.qr(torch.stack([r, *(M @ e for e in kept)], dim=1))[0]
            second = M @ r - taken_out @ (taken_out.T @ M @ r)
            for k, krylov in ((1, [r]), (2, [r, second])):
                space = torch.linalg.qr(torch.stack([*kept, *krylov], dim=1))[0]
                y = torch.linalg.lstsq(M @ space, r.unsqueeze(1), driver="gelsd").solution.squeeze(1)
                best = origin + space @ y
                assert torch.allclose(found[3 * cycle + k], best, rtol=1e-8, atol=1e-8), (cycle, k)

    @pytest.mark.parametrize("restart", [5, 10])
    def test_a_restart_does_not_forget_the_slow_direction(self, restart: int) -> None:
        A, b = nearly_singular(64), normal(5, 3, 64)
        plain, kept = (
            fixed_point(affine_map, 0 * b, A, b, solver=GMRES(restart=restart, keep=keep),
                        stopping=Stopping(rtol=1e-8, max_evals=300)).stats
            for keep in (0, 2)
        )  # fmt: skip
        assert not plain.converged.all()
        assert kept.converged.all()
        assert kept.evaluations < 100

    def test_a_cycle_that_achieves_nothing_is_not_kept(self) -> None:
        """I - A turns the unit vectors in a circle: no cycle shorter than the circle makes the residual smaller."""
        A = torch.eye(6).double() - torch.roll(torch.eye(6).double(), 1, 0)
        b = torch.eye(6).double()[:1]
        for z in iterates(GMRES(restart=3), lambda z: affine_map(z, A, b), 0 * b, 14):
            assert torch.allclose(z, 0 * z, atol=1e-14)
        z, stats = fixed_point(affine_map, 0 * b, A, b, solver=GMRES(restart=6), stopping=Stopping(rtol=1e-12))
        assert stats.converged.all()

    def test_samples_keep_corrections_of_their_own(self) -> None:
        """One that is solved already, one that is solved at once, one that goes on; alone, together, in smaller batches."""
        scale = torch.tensor([[0.0], [1.0], [1.0]]).double()
        A, b = nearly_singular(12), scale * normal(6, 3, 12)
        b[1] = torch.linalg.eigh(A)[1][:, 0]

        def solve(b: Tensor, batch_dims: tuple[int | None, ...] | None) -> Tensor:
            stopping = Stopping(rtol=1e-11, atol=1e-13, max_evals=300)
            z, stats = fixed_point(
                affine_map, 0 * b, A, b, solver=GMRES(restart=4), stopping=stopping, batch_dims=batch_dims
            )
            assert stats.converged.all()
            return z

        together, smaller = solve(b, None), solve(b, (None, 0))
        assert torch.allclose(together, smaller, rtol=1e-9, atol=1e-11)
        for i in range(3):
            assert torch.allclose(together[i], solve(b[i : i + 1], None)[0], rtol=1e-7, atol=1e-9)


def test_after_restarts_the_residual_is_still_true() -> None:
    """In float32 too, where z is much larger than b, and changes of f around z would be rounded to its size."""
    A, b = nearly_singular(64).float(), normal(5, 8, 64).float()
    for rtol in (1e-4, 1e-5):
        f = BudgetedMap(affine_map, (A, b), 200)
        solved = iterate(GMRES(), f, 0 * b, Stopping(rtol=rtol))
        assert f.evaluations > 20
        true = rms(affine_map(solved.z, A, b) - solved.z)
        assert torch.allclose(solved.residual, true, rtol=0.1)


def test_a_derivative_through_a_restart() -> None:
    A, b = (0.9 * orthogonal(5)).requires_grad_(), normal(0, 2, 5).requires_grad_()
    stopping = Stopping(rtol=0, atol=0, max_evals=7)

    def layer(A: Tensor, b: Tensor) -> Tensor:
        solver = GMRES(restart=2)
        return fixed_point(
            affine_map, torch.zeros(2, 5).double(), A, b, solver=solver, stopping=stopping, adjoint=Unrolled()
        ).z

    assert torch.autograd.gradcheck(layer, (A, b))


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
    with pytest.raises(ValueError, match=r"GMRES solves affine maps.*not affine.*use Anderson\(\)"):
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
