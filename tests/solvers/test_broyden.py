"""Broyden's method against its definition, and its theorems."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from problems import Counted, affine_map, matmul, normal, orthogonal
from steps import iterates
from torch import Tensor

from equilibria import Broyden, Stopping, fixed_point


def inverse_after(pairs: list[tuple[Tensor, Tensor]], size: int) -> Tensor:
    """H, from H = -I, after the good update H ← H + (s - H y) sᵀH / (sᵀ H y) for each (s, y) in order."""
    H = -torch.eye(size, dtype=torch.float64)
    for s, y in pairs:
        H = H + torch.outer(s - H @ y, s @ H) / (s @ H @ y)
    return H


def textbook(f: Callable[[Tensor], Tensor], z0: Tensor, steps: int, history: int) -> list[Tensor]:
    """One sample (D,): z ← z - H g, with H of the last `history` pairs alone."""
    zs, pairs = [z0], []
    g = f(z0) - z0
    for _ in range(steps):
        z = zs[-1] - inverse_after(pairs[-history:], len(z0)) @ g
        pairs.append((z - zs[-1], f(z) - z - g))
        g = f(z) - z
        zs.append(z)
    return zs


@pytest.mark.parametrize(("history", "steps"), [(30, 12), (4, 12), (1, 8)], ids=["full", "limited", "one"])
def test_equals_the_textbook_step_by_step(history: int, steps: int) -> None:
    W, x = 0.95 * orthogonal(10), normal(1, 3, 10)
    found = iterates(Broyden(history=history), lambda z: torch.tanh(matmul(W, z) + x), torch.zeros_like(x), steps)
    for i in range(3):
        expected = textbook(lambda z, i=i: torch.tanh(W @ z + x[i]), torch.zeros(10).double(), steps, history)
        for step, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
            assert torch.allclose(mine[i], theirs, rtol=1e-10, atol=1e-10), f"sample {i}, step {step}"


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_full_history_solves_a_linear_map_in_2d_steps(size: int, seed: int) -> None:
    A = normal(seed, size, size) / size**0.5  # not a contraction
    b = normal(seed + 10, 3, size)
    stopping = Stopping(rtol=1e-8, max_evals=2 * size + 1)
    z, stats = fixed_point(affine_map, torch.zeros_like(b), A, b, solver=Broyden(history=2 * size), stopping=stopping)
    assert stats.converged.all()
    assert (stats.steps <= 2 * size).all()
    assert torch.allclose(z, torch.linalg.solve(torch.eye(size).double() - A, b.mT).mT, rtol=1e-5, atol=1e-6)


def overshooting(z: Tensor) -> Tensor:
    """z - 3 arctan(z): the full first step from z = 2 overshoots (to -1.3), and from z = 1.2 to -1.4, further away."""
    return z - 3 * torch.atan(z)


class TestLineSearch:
    z0 = torch.tensor([[1.2], [0.9], [-1.2]]).double()

    def test_every_step_lowers_the_residual(self) -> None:
        """Armijo's condition, where full steps would raise it."""
        free = iterates(Broyden(), overshooting, self.z0, 2)
        safe = iterates(Broyden(line_search=20), overshooting, self.z0, 5)
        residuals = [(overshooting(z) - z).abs() for z in safe]
        assert ((overshooting(free[1]) - free[1]).abs() > (overshooting(self.z0) - self.z0).abs()).any()
        for before, after in pairwise(residuals):
            assert ((after < before) | (after == 0)).all()

    def test_leaves_good_steps_alone(self) -> None:
        """Where every full step lowers the residual enough, the search spends nothing and changes nothing."""
        A, b = 0.3 * orthogonal(6), normal(0, 2, 6)
        plain, searched = (iterates(Broyden(line_search=n), lambda z: affine_map(z, A, b), 0 * b, 4) for n in (0, 5))
        assert all(torch.equal(a, b) for a, b in zip(plain, searched, strict=True))

    def test_counts_and_respects_the_budget(self) -> None:
        for budget in range(1, 12):
            f = Counted(lambda z: z + 1 + z**2)  # no fixed point: the search is never content
            stopping = Stopping(rtol=0, atol=0, max_evals=budget)
            stats = fixed_point(f, self.z0, solver=Broyden(line_search=3), stopping=stopping).stats
            assert stats.evaluations == f.calls == budget

    def test_steps_back_from_where_f_is_not_finite(self) -> None:
        """-log is defined right of 0 alone; z = 2 - log(z) / 0.3 has its full first step outside."""

        def f(z: Tensor) -> Tensor:
            return z - torch.log(z) * 4

        z0 = torch.full((1, 1), 3.0).double()
        free = fixed_point(f, z0, solver=Broyden(), raise_nonfinite=False)
        z, stats = fixed_point(f, z0, solver=Broyden(line_search=20), stopping=Stopping(rtol=1e-8))
        assert not free.stats.converged.any()
        assert stats.converged.all()
        assert float(z) == pytest.approx(1.0, rel=1e-6)


def test_a_singular_system_takes_a_plain_step() -> None:
    """Δf = 0 along the first step while f ≠ 0 elsewhere: sᵀ H y and the small system vanish nowhere, z stays finite."""
    z0 = torch.tensor([[0.0], [1.0]]).double()
    z, stats = fixed_point(lambda z: z + torch.ones_like(z), z0, solver=Broyden(), stopping=Stopping(max_evals=8))
    # g is constant, so y = 0 and the system is singular at every step: plain steps, z = z0 + n; the residual stays 1.
    assert z.isfinite().all()
    assert stats.residual.tolist() == [1.0, 1.0]
    assert stats.evaluations == 8
