"""The solvers as released: proper solvers in `fixed_point`, and whole solves under the batch's stopping rule."""

from __future__ import annotations

import doctest
import math

import pytest
import torch
from torch import Tensor

from equilibria import Broyden, Status, Stopping, fixed_point
from equilibria.interop.original import solvers, steps
from equilibria.interop.original.solvers import anderson_2021, broyden_2019, broyden_2021
from equilibria.interop.original.steps import ArmijoBroyden, RidgeAnderson, armijo

F64 = torch.float64


def tanh_map(seed: int = 0, scale: float = 0.9, batch: int = 3, size: int = 12) -> tuple[Tensor, Tensor]:
    """W of norm `scale` and u (B, D) of z = tanh(W z + u)."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(size, size, generator=generator, dtype=F64)
    return scale * weight / torch.linalg.matrix_norm(weight, 2), torch.randn(batch, size, generator=generator, dtype=F64)


def f(z: Tensor, weight: Tensor, u: Tensor) -> Tensor:
    return torch.tanh(z @ weight.T + u)


@pytest.mark.parametrize(
    "solver", [ArmijoBroyden(history=60), RidgeAnderson(ridge=1e-14), RidgeAnderson(history=3, ridge=1e-14)]
)
@pytest.mark.parametrize("max_evals", [3, 200])
def test_serves_in_fixed_point(solver, max_evals):
    weight, u = tanh_map()
    calls = 0

    def counted(z: Tensor, weight: Tensor, u: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return f(z, weight, u)

    with torch.no_grad():
        stopping = Stopping(rtol=1e-10, max_evals=max_evals)
        z, stats = fixed_point(counted, torch.zeros_like(u), weight, u, solver=solver, stopping=stopping)
    assert stats.evaluations <= max_evals
    assert calls <= max_evals + 1  # one more where f is watched for what it depends on
    torch.testing.assert_close(stats.residual, (f(z, weight, u) - z).square().mean(1).sqrt(), rtol=1e-6, atol=1e-14)
    assert bool(stats.converged.all()) == (max_evals == 200)


def test_an_absolute_ridge_stalls_and_a_small_one_does_not():
    weight, u = tanh_map(scale=2.0)
    residuals = {}
    for ridge in (1e-4, 1e-12):
        solver = RidgeAnderson(ridge=ridge)
        stopping = Stopping(rtol=0.0, atol=0.0, max_evals=60)
        residuals[ridge] = fixed_point(
            f, torch.zeros_like(u), weight, u, solver=solver, stopping=stopping
        ).stats.residual.max()
    assert residuals[1e-12] < 1e-2 * residuals[1e-4]


def test_full_steps_that_suffice_are_those_of_broyden():
    """Where Armijo's condition holds at every full step, nothing is searched."""
    weight, u = tanh_map(scale=0.3)
    found = [
        fixed_point(f, torch.zeros_like(u), weight, u, solver=solver, stopping=Stopping(rtol=1e-12)).z
        for solver in (ArmijoBroyden(history=50), Broyden(history=50))
    ]
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_the_search_never_takes_a_step_that_raises_the_residual_and_finds_the_root_of_arctan():
    """g(z) = -arctan(z) from z = 3: full steps of Newton's method diverge."""
    z0 = torch.full((1, 1, 1), 3.0, dtype=F64)
    ours = broyden_2019(lambda z: z - 5 * torch.atan(z), z0, threshold=40, eps=1e-10, line_search=True)
    assert ours.trace[-1] < 1e-10
    assert abs(float(ours.result)) < 1e-10
    assert ours.tnstep >= ours.nstep


@pytest.mark.parametrize("root", [0.15, 0.3, 0.6])
def test_armijo_on_a_parabola(root):
    """φ falls from 1 with slope -1 only near zero; what is taken meets the condition."""

    def phi(alpha: float) -> float:
        return 1.0 - alpha + (alpha / root) ** 2 / 2

    alpha, trials = armijo(phi, 1.0, lambda: True)
    assert phi(alpha) <= 1.0 - 1e-4 * alpha
    assert 0 < alpha < 1
    assert trials >= 1  # the minimum of the parabola itself is not taken, as released
    assert armijo(phi, 1.0, lambda: False) == (1.0, 0)


@pytest.mark.parametrize("phi", [lambda a: math.inf, lambda a: 2.0, lambda a: math.nan])
def test_armijo_falls_back_to_the_full_step(phi):
    assert armijo(phi, 1.0, lambda: True)[0] == 1.0


@pytest.mark.parametrize("quirk", [False, True])
def test_what_is_returned_where_nothing_is_better_than_the_start(quirk):
    x0 = torch.ones(2, 3, 4, dtype=F64)
    ours = broyden_2019(lambda x: x + 1e3 * (x**2 + 1), x0, threshold=20, eps=1e-9, last_if_none_better=quirk)
    assert ours.prot_break
    assert ours.lowest_step == 0
    assert torch.equal(ours.result, x0) != quirk
    assert ours.diff == pytest.approx(ours.trace[-1] if quirk else ours.trace[0])


def test_a_start_that_is_a_root_takes_no_step():
    ours = broyden_2019(lambda x: x, torch.ones(2, 3, 4), threshold=20, eps=1e-9)
    assert (ours.nstep, ours.evaluations, ours.trace) == (0, 1, [0.0])
    assert torch.equal(ours.result, torch.ones(2, 3, 4))


@pytest.mark.parametrize("solve", [broyden_2021, anderson_2021])
@pytest.mark.parametrize("mode", ["abs", "rel"])
def test_traces_of_2021_are_padded_and_the_result_has_the_lowest_residual(solve, mode):
    weight, u = tanh_map()
    x0 = torch.zeros(3, 4, 3, dtype=F64)

    def g(x: Tensor) -> Tensor:
        return f(x.flatten(1), weight, u).view_as(x)

    ours = solve(g, x0, threshold=30, eps=1e-4, stop_mode=mode)
    assert len(ours.abs_trace) == len(ours.rel_trace) == (31 if solve is broyden_2021 else 28)
    trace = ours.abs_trace if mode == "abs" else ours.rel_trace
    assert ours.lowest == min(trace) == trace[-1] < 1e-4
    residual = float((g(ours.result) - ours.result).norm())
    assert residual == pytest.approx(min(ours.abs_trace), rel=1e-9) or mode == "rel"


def test_the_budget_runs_out_within_a_search():
    z0 = torch.full((1, 1), 3.0, dtype=F64)
    for max_evals in range(1, 8):
        stopping = Stopping(rtol=1e-12, max_evals=max_evals)
        solved = fixed_point(lambda z: z - 5 * torch.atan(z), z0, solver=ArmijoBroyden(), stopping=stopping)
        assert solved.stats.evaluations <= max_evals
        assert solved.stats.status.tolist() == [Status.EXHAUSTED]


def test_impossible_options():
    with pytest.raises(ValueError, match="has its own"):
        ArmijoBroyden(line_search=3)
    with pytest.raises(ValueError, match="ridge must be >= 0"):
        RidgeAnderson(ridge=-1.0)
    with pytest.raises(ValueError, match="history"):
        RidgeAnderson(history=0)
    with pytest.raises(ValueError, match="damping"):
        RidgeAnderson(damping=0.0)


@pytest.mark.parametrize("module", [solvers, steps])
def test_examples_run(module):
    assert doctest.testmod(module).failed == 0
