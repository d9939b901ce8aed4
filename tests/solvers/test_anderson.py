"""Anderson acceleration against its definition, and its theorems."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from problems import PROBLEMS, affine_map, matmul, normal, normal_matrix, orthogonal
from steps import iterates
from torch import Tensor

from equilibria import Anderson, Picard, Stopping, fixed_point


def textbook(f: Callable[[Tensor], Tensor], z0: Tensor, steps: int, history: int, damping: float) -> list[Tensor]:
    """One sample (D,), type II in differences: γ = argmin ‖g - ΔG γ‖ by least squares on the last `history` differences."""
    zs, fs = [z0], [f(z0)]
    for _ in range(steps):
        g = fs[-1] - zs[-1]
        differences = range(max(1, len(zs) - history), len(zs))
        z = zs[-1] + damping * g
        if differences:
            dz = torch.stack([zs[i] - zs[i - 1] for i in differences], dim=1)
            dg = torch.stack([(fs[i] - zs[i]) - (fs[i - 1] - zs[i - 1]) for i in differences], dim=1)
            gamma = torch.linalg.lstsq(dg, g.unsqueeze(1), driver="gelsd").solution
            z = z - ((dz + damping * dg) @ gamma).squeeze(1)
        zs.append(z)
        fs.append(f(z))
    return zs


@pytest.mark.parametrize("damping", [1.0, 0.7, 0.3])
@pytest.mark.parametrize(("history", "steps"), [(1, 8), (2, 8), (3, 9), (20, 6)], ids=["1", "2", "3 truncated", "full"])
def test_equals_naive_least_squares(history: int, steps: int, damping: float) -> None:
    W, x = 0.9 * orthogonal(12), normal(1, 3, 12)
    found = iterates(
        Anderson(history=history, damping=damping), lambda z: torch.tanh(matmul(W, z) + x), torch.zeros_like(x), steps
    )
    for i in range(3):
        expected = textbook(lambda z, i=i: torch.tanh(W @ z + x[i]), torch.zeros(12).double(), steps, history, damping)
        for step, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
            # Normal equations square the condition of the least-squares problem: here below 1e6, so 1e-16 · 1e6.
            assert torch.allclose(mine[i], theirs, rtol=1e-9, atol=1e-9), f"sample {i}, step {step}"


@pytest.mark.parametrize("size", [1, 2, 4, 6])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_full_history_solves_a_linear_map_in_d_plus_2_evaluations(size: int, seed: int) -> None:
    A = 1.5 * normal(seed, size, size) / size**0.5  # not a contraction
    b = normal(seed + 10, 3, size)
    stopping = Stopping(rtol=1e-7, max_evals=size + 2)
    z, stats = fixed_point(affine_map, torch.zeros_like(b), A, b, solver=Anderson(history=size), stopping=stopping)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_singular_system_takes_a_plain_step(dtype: torch.dtype) -> None:
    """f is constant in a step, so that the difference of g is parallel to it for ever: two equal columns, no ridge."""
    z0 = torch.tensor([[1.0, 0.0], [4.0, 0.0]], dtype=dtype)

    def shift_then_halve(z: Tensor) -> Tensor:  # the second entry stays 0, so all differences lie on one line
        return torch.stack((0.5 * torch.sin(z[:, 0]), z[:, 1]), dim=1)

    z, stats = fixed_point(
        shift_then_halve, z0, solver=Anderson(history=3, ridge=0.0), stopping=Stopping(rtol=0, atol=1e-5, max_evals=60)
    )
    assert z.isfinite().all()
    assert stats.converged.all()


@pytest.mark.parametrize("ridge", [None, 0.0, 1e-6])
def test_goes_on_at_rest(ridge: float | None) -> None:
    """A sample that sits at its fixed point has no differences at all; it must neither fail nor disturb the other."""
    z0 = torch.tensor([[2.0, 2.0], [0.0, 5.0]]).double()
    stopping = Stopping(rtol=0, atol=1e-10, max_evals=60, trace=True)
    z, stats = fixed_point(lambda z: 0.5 * torch.sin(z - 2) + 2, z0, solver=Anderson(ridge=ridge), stopping=stopping)
    assert stats.converged.all()
    assert stats.steps[0] == 0
    assert torch.equal(z[0], z0[0])
    assert torch.allclose(z[1], z0[0], atol=1e-9)
