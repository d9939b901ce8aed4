"""Theorems about Picard iteration."""

from __future__ import annotations

import math

import pytest
import torch
from problems import PROBLEMS, affine_map, normal, normal_matrix

from equilibria import Picard, Stopping, fixed_point
from equilibria.solvers import Solver


def observed_rate(A: torch.Tensor, solver: Solver, steps: int = 400, window: int = 100) -> float:
    """The factor by which the residual of z = A z falls per step, over the last `window` steps.

    Towards zero, so that rounding, being relative, sets no floor.
    """
    z0 = normal(0, 1, len(A))
    stopping = Stopping(rtol=0, atol=0, max_evals=steps + 1, trace=True)
    stats = fixed_point(affine_map, z0, A, 0 * z0, solver=solver, stopping=stopping).stats
    assert stats.trace is not None
    return float((stats.trace[steps] / stats.trace[steps - window]) ** (1 / window))


@pytest.mark.parametrize("damping", [1.0, 0.5, 0.2])
@pytest.mark.parametrize(
    ("real", "rotations"),
    [([0.95, 0.3, -0.5], ()), ([-0.97, 0.1], ()), ([0.2, -0.3], ((0.96, 2.5),)), ([], ((0.98, 0.3), (0.9, 1.0)))],
    ids=["positive", "negative", "rotation", "two rotations"],
)
def test_rate_is_the_spectral_radius(real: list[float], rotations: tuple[tuple[float, float], ...], damping: float) -> None:
    A = normal_matrix(torch.tensor(real), rotations)
    step = (1 - damping) * torch.eye(len(A), dtype=A.dtype) + damping * A
    radius = float(torch.linalg.eigvals(step).abs().max())
    # A is normal, so the residual in the leading eigenspace falls by exactly the radius; the rest has died out, unless it
    # fell at nearly the same rate.
    assert observed_rate(A, Picard(damping=damping)) == pytest.approx(radius, rel=1e-3)


def test_damping_tames_eigenvalues_below_minus_one() -> None:
    A, b = normal_matrix(torch.tensor([-1.5, 0.2])), normal(0, 2, 2)
    stopping = Stopping(rtol=1e-8, max_evals=200)
    assert not fixed_point(affine_map, b, A, b, solver=Picard(), stopping=stopping).stats.converged.any()
    z, stats = fixed_point(affine_map, b, A, b, solver=Picard(damping=0.5), stopping=stopping)
    assert stats.converged.all()
    assert torch.allclose(z, torch.linalg.solve(torch.eye(2).double() - A, b.mT).mT, rtol=1e-7)


def test_plain_iteration_applies_f_again_and_again() -> None:
    problem = PROBLEMS["tanh_contraction"](2, (5,), torch.float64)
    z = problem.z0
    for _ in range(7):
        z = problem.f(z, *problem.args)
    stopping = Stopping(rtol=0, atol=0, max_evals=8)
    assert torch.equal(fixed_point(problem.f, problem.z0, *problem.args, solver=Picard(), stopping=stopping).z, z)


def test_evaluations_follow_from_the_rate() -> None:
    """|rate|^n <= rtol · ‖f‖ / ‖g0‖ has its first solution n where it is predicted for a scalar."""
    rate, rtol = 0.9, 1e-6
    stats = fixed_point(lambda z: rate * z + 1, torch.zeros(1, 1).double(), solver=Picard(), stopping=Stopping(
        rtol=rtol, atol=0, max_evals=1000)).stats  # fmt: skip
    # z_n = 10 (1 - rate^n), residual rate^n, ‖f(z_n)‖ = 10 (1 - rate^(n+1)).
    predicted = math.ceil(math.log(10 * rtol) / math.log(rate))
    assert int(stats.steps[0]) == predicted
    assert stats.evaluations == predicted + 1
