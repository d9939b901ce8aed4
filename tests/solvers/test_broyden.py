"""Broyden's method against its definition, and its theorems."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from problems import Counted, affine_map, matmul, normal, orthogonal
from steps import Unlimited, iterates
from torch import Tensor

from equilibria import Broyden, Stats, Status, Stopping, fixed_point


def inverse_after(pairs: list[tuple[Tensor, Tensor]], size: int) -> Tensor:
    """H, from H = -I, after the good update H ← H + (s - H y) sᵀH / (sᵀ H y) for each (s, y) in order."""
    H = -torch.eye(size, dtype=torch.float64)
    for s, y in pairs:
        H = H + torch.outer(s - H @ y, s @ H) / (s @ H @ y)
    return H


def textbook(
    f: Callable[[Tensor], Tensor], z0: Tensor, steps: int, history: int, storage: torch.dtype = torch.float64
) -> list[Tensor]:
    """One sample (D,): z ← z - H g, with H of the last `history` pairs alone, their Δz and Δf rounded to `storage`."""
    zs, pairs = [z0], []
    for _ in range(steps):
        g = f(zs[-1]) - zs[-1]
        z = zs[-1] - inverse_after(pairs[-history:], len(z0)) @ g
        s, df = ((new - old).to(storage).double() for new, old in ((z, zs[-1]), (f(z), f(zs[-1]))))
        pairs.append((s, df - s))
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


class TestStorage:
    W = 0.95 * orthogonal(10)
    x = normal(1, 3, 10)

    @pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float32])
    @pytest.mark.parametrize("history", [4, 30])
    def test_is_broyden_s_method_on_rounded_pairs(self, history: int, storage: torch.dtype) -> None:
        """Products of what is stored are taken in the precision of the solve: nothing else is rounded."""
        solver = Broyden(history=history, storage=storage)
        found = iterates(solver, lambda z: torch.tanh(matmul(self.W, z) + self.x), 0 * self.x, 12)
        for i, x in enumerate(self.x):
            expected = textbook(lambda z, x=x: torch.tanh(self.W @ z + x), 0 * x, 12, history, storage)
            for step, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
                assert torch.allclose(mine[i], theirs, rtol=1e-9, atol=1e-9), f"sample {i}, step {step}"

    @pytest.mark.parametrize(("dtype", "held"), [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)])
    def test_memory(self, dtype: torch.dtype, held: torch.dtype) -> None:
        z0 = torch.zeros(2, 50, dtype=dtype)
        plain, small = (Broyden(storage=s).init(Unlimited(torch.cos), z0) for s in (None, torch.bfloat16))
        assert (plain.s.dtype, plain.df.dtype) == (held, held)
        assert (small.s.dtype, small.df.dtype) == (torch.bfloat16, torch.bfloat16)
        assert small.s.nbytes + small.df.nbytes == 2 * 2 * 10 * 50 * 2
        assert small.core.dtype == small.inverse.dtype == small.g.dtype == torch.float32

    def test_the_fixed_point_keeps_its_precision(self) -> None:
        """Pairs steer the search only: z converges to the tolerance of float32, in few steps more."""
        x = self.x.float()
        f = lambda z: torch.tanh(matmul(self.W.float(), z) + x)  # noqa: E731
        stopping = Stopping(rtol=1e-6, max_evals=100)
        plain, small = (fixed_point(f, 0 * x, solver=Broyden(storage=s), stopping=stopping) for s in (None, torch.bfloat16))
        assert small.stats.converged.all()
        assert small.stats.evaluations <= plain.stats.evaluations + 3
        assert torch.allclose(plain.z, small.z, atol=1e-5)

    @pytest.mark.parametrize("storage", [torch.int32, "bfloat16"])
    def test_refuses_what_cannot_hold_pairs(self, storage: Any) -> None:
        with pytest.raises(TypeError, match=r"storage must be a floating dtype such as torch\.bfloat16"):
            Broyden(storage=storage)


def steep(z: Tensor) -> Tensor:
    """The root of sinh(z - 1) is 1; plain steps from afar, and secants that are nearly flat, overflow."""
    return z - torch.sinh(z - 1)


class TestDivergence:
    z0 = 2 * normal(0, 64, 2)

    def solve(self, divergence: float | None) -> Stats:
        solver, stopping = Broyden(divergence=divergence), Stopping(rtol=1e-8, max_evals=60, trace=True)
        return fixed_point(steep, self.z0, solver=solver, stopping=stopping, raise_nonfinite=False).stats

    def test_nothing_overflows(self) -> None:
        free, guarded = self.solve(None), self.solve(1e4)
        assert (free.status == Status.NONFINITE).any()
        assert not (guarded.status == Status.NONFINITE).any()

    def test_samples_that_do_not_diverge_are_left_alone(self) -> None:
        free, guarded = self.solve(None), self.solve(1e4)
        assert free.trace is not None
        assert guarded.trace is not None
        tame = (free.trace <= 1e4 * free.trace.cummin(dim=0).values).all(dim=0)
        assert tame.any()
        assert not tame.all()
        assert torch.equal(free.steps[tame], guarded.steps[tame])
        assert torch.equal(free.residual[tame], guarded.residual[tame])

    def test_goes_back_to_the_best_iterate_and_goes_on(self) -> None:
        found = iterates(Broyden(divergence=50.0), steep, self.z0, 12)  # checks that f(z) is known
        residuals = torch.stack([(steep(z) - z).norm(dim=1) for z in found])
        assert (residuals[1:] <= 50 * residuals.cummin(dim=0).values[:-1]).all()
        returned = 0
        for i in range(len(self.z0)):
            for n in range(2, 12):
                best = int(residuals[:n, i].argmin())
                returned += (
                    best < n - 1 and torch.equal(found[n][i], found[best][i]) and residuals[n + 1, i] < residuals[n, i]
                )
        assert returned > 0

    def test_costs_no_roots(self) -> None:
        assert self.solve(1e4).converged.sum() >= self.solve(None).converged.sum()


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
