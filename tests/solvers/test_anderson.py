"""Anderson acceleration against its definition, and its theorems."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import pytest
import torch
from problems import PROBLEMS, affine_map, matmul, normal, normal_matrix, orthogonal, tanh_map
from steps import iterates
from torch import Tensor

from equilibria import Anderson, Picard, Stopping, fixed_point
from equilibria.iterate import BudgetedMap
from equilibria.models.block import TransformerBlock


def textbook(
    f: Callable[[Tensor], Tensor],
    z0: Tensor,
    steps: int,
    solver: Anderson,
) -> tuple[list[Tensor], int]:
    """One sample (D,) by dense algebra on the last `history` pairs: its iterates, and how often it forgot its pairs.

    Type II: γ = argmin ‖g - ΔG γ‖ by least squares; type I: (ΔZᵀ ΔG) γ = ΔZᵀ g.
    """
    assert solver.damping is not None
    zs, pairs, forgotten, expansion = [z0], [], 0, 1.0
    g = f(z0) - z0
    for _ in range(steps):
        step, rest = g, g
        if pairs:
            dz, dg = (torch.stack(columns, dim=1) for columns in zip(*pairs[-solver.history :], strict=True))
            if solver.type == 1:
                gamma = torch.linalg.solve(dz.T @ dg, dz.T @ g)
            else:
                gamma = torch.linalg.lstsq(dg, g.unsqueeze(1), driver="gelsd").solution.squeeze(1)
            rest = g - dg @ gamma
            step = solver.damping * rest - dz @ gamma
        else:
            step = solver.damping * g
        z = zs[-1] + step
        new = f(z) - z
        if not pairs:
            expansion = max(expansion, float(new.norm() / g.norm()))
        bound = expansion * max(float(rest.norm()), 0.5 * float(g.norm()))
        lost = bool(pairs and solver.type == 2 and solver.restart and new.norm() > solver.restart * bound)
        pairs = [] if lost else [*pairs, (step, new - g)]
        forgotten += lost
        g = new
        zs.append(z)
    return zs, forgotten


@pytest.mark.parametrize("kind", [1, 2])
@pytest.mark.parametrize("damping", [1.0, 0.7, 0.3])
@pytest.mark.parametrize(("history", "steps"), [(1, 8), (2, 8), (3, 9), (20, 6)], ids=["1", "2", "3 truncated", "full"])
def test_equals_the_textbook_step_by_step(history: int, steps: int, damping: float, kind: Literal[1, 2]) -> None:
    W, x = 0.9 * orthogonal(12), normal(1, 3, 12)
    solver = Anderson(history=history, damping=damping, type=kind, restart=None)
    found = iterates(solver, lambda z: torch.tanh(matmul(W, z) + x), torch.zeros_like(x), steps)
    for i in range(3):
        expected, _ = textbook(lambda z, i=i: torch.tanh(W @ z + x[i]), torch.zeros(12).double(), steps, solver)
        for step, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
            # Normal equations square the condition of the least-squares problem: here below 1e6, so 1e-16 · 1e6.
            assert torch.allclose(mine[i], theirs, rtol=1e-9, atol=1e-9), f"sample {i}, step {step}"


def test_types_differ() -> None:
    W, x = 0.9 * orthogonal(12), normal(1, 3, 12)
    one, two = (iterates(Anderson(type=kind), lambda z: tanh_map(z, W, x), torch.zeros_like(x), 4) for kind in (1, 2))
    assert torch.equal(one[1], two[1])
    assert (one[4] - two[4]).norm() > 1e-3 * two[4].norm()


@pytest.mark.parametrize("size", [1, 2, 4, 6])
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("kind", [1, 2])
def test_full_history_solves_a_linear_map_in_d_plus_2_evaluations(size: int, seed: int, kind: Literal[1, 2]) -> None:
    A = 1.5 * normal(seed, size, size) / size**0.5  # not a contraction
    b = normal(seed + 10, 3, size)
    solver, stopping = Anderson(history=size, type=kind, restart=None), Stopping(rtol=1e-7, max_evals=size + 2)
    z, stats = fixed_point(affine_map, torch.zeros_like(b), A, b, solver=solver, stopping=stopping)
    assert stats.converged.all()
    exact = torch.linalg.solve(torch.eye(size).double() - A, b.mT).mT
    assert torch.allclose(z, exact, rtol=1e-5, atol=1e-5)


def test_needs_all_of_them() -> None:
    """The theorem is sharp: with d - 1 differences, d + 2 evaluations are not enough."""
    A, b = normal_matrix(torch.tensor([-0.9, -0.3, 0.4, 0.9])), normal(3, 1, 4)
    stopping = Stopping(rtol=1e-7, max_evals=6)
    assert fixed_point(affine_map, b, A, b, solver=Anderson(history=4), stopping=stopping).stats.converged.all()
    assert not fixed_point(affine_map, b, A, b, solver=Anderson(history=2), stopping=stopping).stats.converged.any()


def test_takes_fewer_evaluations_than_picard() -> None:
    problem = PROBLEMS["affine"](3, (5,), torch.float64)
    stopping = Stopping(rtol=1e-8, max_evals=1000)

    def cost(solver: Anderson | Picard) -> int:
        return fixed_point(problem.f, problem.z0, *problem.args, solver=solver, stopping=stopping).stats.evaluations

    assert 3 * cost(Anderson()) < cost(Picard())


def test_small_residuals_are_not_drowned_by_the_ridge() -> None:
    """The ridge is relative: a map scaled by 1e-8 takes the same steps."""
    problem = PROBLEMS["affine"](1, (5,), torch.float64)
    A, b = problem.args
    stopping = Stopping(rtol=1e-9, atol=0, max_evals=200)
    large = fixed_point(affine_map, problem.z0, A, b, stopping=stopping)
    small = fixed_point(affine_map, problem.z0, A, 1e-8 * b, stopping=stopping)
    assert large.stats.evaluations == small.stats.evaluations
    assert torch.allclose(1e-8 * large.z, small.z, rtol=1e-9, atol=0)


class TestRestart:
    W = 3.0 * normal(4, 12, 12) / 12**0.5
    x = normal(5, 4, 12)

    def test_equals_the_textbook_with_its_rule(self) -> None:
        """Each sample forgets for itself, after the very steps after which the rule says so."""
        solver = Anderson(history=6, type=2, restart=1.2)
        found = iterates(solver, lambda z: tanh_map(z, self.W, self.x), torch.zeros_like(self.x), 18)
        restarts = []
        for i, x in enumerate(self.x):
            expected, forgotten = textbook(lambda z, x=x: torch.tanh(self.W @ z + x), 0 * x, 18, solver)
            restarts.append(forgotten)
            for step, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
                assert torch.allclose(mine[i], theirs, rtol=1e-6, atol=1e-6), f"sample {i}, step {step}"
        assert max(restarts) >= 2
        assert min(restarts) < max(restarts)

    def test_leaves_contractions_alone(self) -> None:
        """The residual after a step on an affine map is A (g - ΔG γ): no longer than g - ΔG γ where ‖A‖ <= 1."""
        A, b = 0.99 * orthogonal(20), normal(1, 3, 20)
        plain, guarded = (
            iterates(Anderson(history=8, restart=restart), lambda z: affine_map(z, A, b), 0 * b, 30)
            for restart in (None, 1.01)
        )
        assert all(torch.equal(a, b) for a, b in zip(plain, guarded, strict=True))

    def test_leaves_expansions_that_a_plain_step_shows_alone(self) -> None:
        """A = 3 Q with Q orthogonal: every step but the extrapolation multiplies the residual by 3, as the first shows."""
        A, b = 3.0 * orthogonal(8), normal(1, 3, 8)
        stopping = Stopping(rtol=1e-8, max_evals=10)
        assert fixed_point(affine_map, b, A, b, solver=Anderson(restart=1.1), stopping=stopping).stats.converged.all()


class TestStalling:
    """Where type II rests at a least residual that is no root, type I goes on."""

    @staticmethod
    def solve(solver: Anderson, rows: slice = slice(None)) -> Tensor:
        """The steps of every sample; 300 where it did not converge."""
        W, x = 2.0 * orthogonal(32, seed=6), normal(106, 8, 32)
        stopping = Stopping(rtol=1e-8, max_evals=300)
        stats = fixed_point(tanh_map, torch.zeros_like(x[rows]), W, x[rows], solver=solver, stopping=stopping).stats
        return torch.where(stats.converged, stats.steps, 300)

    def test_type_two_stalls_and_the_default_does_not(self) -> None:
        assert (self.solve(Anderson(type=2)) == 300).any()
        assert (self.solve(Anderson(type=1)) < 200).all()
        assert (self.solve(Anderson()) < 200).all()

    def test_only_the_sample_that_stalls_changes(self) -> None:
        two, both = self.solve(Anderson(type=2)), self.solve(Anderson())
        quick = two < 60
        assert quick.any()
        assert torch.equal(two[quick], both[quick])

    def test_stalling_is_a_sample_s_own_affair(self) -> None:
        """Beside samples that do not stall, the one that does takes the steps it takes alone."""
        W, x = 2.0 * orthogonal(32, seed=6), normal(106, 8, 32)
        hard = int(self.solve(Anderson(type=2)).argmax())
        together = iterates(Anderson(), lambda z: tanh_map(z, W, x), 0 * x, 60)
        alone = iterates(Anderson(), lambda z: tanh_map(z, W, x[hard : hard + 1]), 0 * x[:1], 60)
        other = iterates(Anderson(type=2), lambda z: tanh_map(z, W, x), 0 * x, 60)
        assert (together[60][hard] - other[60][hard]).norm() > 1e-2  # it did stall on the way
        for mine, theirs in zip(together, alone, strict=True):
            assert torch.allclose(mine[hard], theirs[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", [1, 2, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_singular_system_takes_a_plain_step(dtype: torch.dtype, kind: Literal[1, 2] | None) -> None:
    """f is constant in a step, so that the difference of g is parallel to it for ever: two equal columns, no ridge."""
    z0 = torch.tensor([[1.0, 0.0], [4.0, 0.0]], dtype=dtype)

    def shift_then_halve(z: Tensor) -> Tensor:  # the second entry stays 0, so all differences lie on one line
        return torch.stack((0.5 * torch.sin(z[:, 0]), z[:, 1]), dim=1)

    solver, stopping = Anderson(history=3, ridge=0.0, type=kind), Stopping(rtol=0, atol=1e-5, max_evals=60)
    z, stats = fixed_point(shift_then_halve, z0, solver=solver, stopping=stopping)
    assert z.isfinite().all()
    assert stats.converged.all()


@pytest.mark.parametrize("kind", [1, 2, None])
@pytest.mark.parametrize("ridge", [None, 0.0, 1e-6])
def test_goes_on_at_rest(ridge: float | None, kind: Literal[1, 2] | None) -> None:
    """A sample that sits at its fixed point has no differences at all; it must neither fail nor disturb the other."""
    z0 = torch.tensor([[2.0, 2.0], [0.0, 5.0]]).double()
    solver, stopping = Anderson(ridge=ridge, type=kind), Stopping(rtol=0, atol=1e-10, max_evals=60, trace=True)
    z, stats = fixed_point(lambda z: 0.5 * torch.sin(z - 2) + 2, z0, solver=solver, stopping=stopping)
    assert stats.converged.all()
    assert stats.steps[0] == 0
    assert torch.equal(z[0], z0[0])
    assert torch.allclose(z[1], z0[0], atol=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"type": 3}, r"Anderson\(type=3\): type must be 1 or 2, or None"),
        ({"restart": 0.5}, r"Anderson\(restart=0.5\): restart must be a number >= 1.0, or None"),
    ],
)
def test_refuses_options_out_of_range(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Anderson(**options)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


class TestDampingByProgress:
    """`damping=None`."""

    def test_the_stretch_is_the_best_damping_of_a_linear_map(self) -> None:
        """β* = r · r / r · (I - J) r for r = g - Σ γᵢ Δgᵢ, as of history 3 with pairs that were overwritten."""
        J = 0.85 * torch.eye(12).double() + 0.1 * normal(0, 12, 12) / 12**0.5
        b = normal(1, 4, 12)
        f = BudgetedMap(lambda z: z @ J.T + b, [], 40)
        solver = Anderson(history=3, damping=None, type=2, restart=1.01, ridge=0.0)
        state, lengthened, checked = solver.init(f, 0 * b), False, 0
        for _ in range(14):
            age, g, norm, mark = state.age, state.g.clone(), state.norm, state.mark
            dg, inverse, before = state.dg[:, :age].clone(), state.inverse[:, :age].clone(), state.stretch
            lengthened |= bool((before > math.log(1.5)).any())
            state = solver.step(f, state)
            if age == 0:
                continue
            for i in range(4):
                pairs = dg[i][inverse[i] > 0]
                r = (
                    g[i] - (pairs.T @ torch.linalg.lstsq(pairs.T, g[i, :, None]).solution).squeeze(1)
                    if len(pairs)
                    else g[i]
                )
                best = r @ r / (r @ (r - J @ r))
                expected = torch.lerp(before[i], best.clamp(1 / 3, 3).log() if best > 0 else 0 * best, 0.3)
                if state.norm[i] <= min(0.7 * float(mark[i]), 0.505 * float(norm[i])):
                    expected = before[i]
                assert torch.allclose(state.stretch[i], expected, atol=1e-6)
                checked += 1
        assert lengthened
        assert checked == 52

    def test_fewer_evaluations_near_the_identity(self) -> None:
        torch.manual_seed(0)
        block = TransformerBlock(64, 4, 256)
        u = torch.randn(8, 32, 192)
        with torch.no_grad():
            args = block.prepare(u)
            found: dict[float | None, int] = {}
            for damping in (1.0, None):
                stopping = Stopping(rtol=1e-3, atol=0, max_evals=200)
                solution = fixed_point(block, block.initial(u), *args, solver=Anderson(damping=damping), stopping=stopping)
                assert solution.stats.converged.all()
                found[damping] = int(solution.stats.steps.sum())
        assert found[None] <= 0.95 * found[1.0]

    def test_nothing_changes_on_a_contraction(self) -> None:
        W, x = normal(0, 64, 64), normal(1, 8, 64)
        W = 0.9 * W / torch.linalg.matrix_norm(W, 2)
        one, chosen = (
            fixed_point(tanh_map, 0 * x, W, x, solver=Anderson(damping=damping), stopping=Stopping(rtol=1e-8))
            for damping in (1.0, None)
        )
        assert torch.equal(one.z, chosen.z)

    def test_a_sample_alone_and_in_a_batch(self) -> None:
        J = 0.85 * torch.eye(12).double() + 0.1 * normal(0, 12, 12) / 12**0.5
        b = normal(1, 4, 12)
        f = lambda z, b: z @ J.T + b.sin()  # noqa: E731
        solver, stopping = Anderson(damping=None, history=4), Stopping(rtol=1e-9, max_evals=100)
        whole = fixed_point(f, 0 * b, b, solver=solver, stopping=stopping)
        assert whole.stats.converged.all()
        for i in range(4):
            alone = fixed_point(f, 0 * b[i : i + 1], b[i : i + 1], solver=solver, stopping=stopping)
            assert int(alone.stats.steps) == int(whole.stats.steps[i])
            assert torch.allclose(alone.z, whole.z[i : i + 1], rtol=1e-6, atol=1e-9)
