"""The side-by-side suite refuses wrong results, poses problems that have solutions, and its stored rows keep its rules.

None of the peers is needed here.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from equilibria import Stopping, fixed_point

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
try:
    import peers.problems as problems
    from peers.check import GRADIENT, ROUNDING, Found, Verdict, gradient_verdict, loosest, residuals, verdict
    from peers.contender import Scale
    from peers.torch_solvers import equilibria as ours
finally:
    sys.path.remove(str(BENCHMARKS))

SMALL: dict[str, Callable[[], problems.Problem]] = {
    "random": lambda: problems.tanh(64, 4, 1.5),
    "orthogonal": lambda: problems.tanh(64, 4, 1.2, orthogonal=True),
    "uneven": lambda: problems.tanh(32, 16, 0.95, orthogonal=True, uneven=True),
    "block": lambda: problems.transformer("block", 16, 2, 5, memory=3),
    "steep block": lambda: problems.transformer("block", 16, 2, 5, std=0.05),
}
STORED = BENCHMARKS / "results" / "peers.json"
NAMES = ("random", "orthogonal", "block")


def solved(problem: problems.Problem, rtol: float = 1e-10) -> np.ndarray:
    """A fixed point, in float64."""
    z0 = torch.zeros(problem.shape, dtype=torch.float64)
    with torch.no_grad():
        stopping = Stopping(rtol=rtol, max_evals=1000)
        z, stats = fixed_point(problem.torch_map, z0, *problem.torch_args(torch.float64), stopping=stopping)
    assert stats.converged.all()
    return z.numpy()


@pytest.fixture(params=list(SMALL))
def problem(request: pytest.FixtureRequest) -> problems.Problem:
    return SMALL[request.param]()


class TestProblems:
    def test_have_fixed_points(self, problem: problems.Problem) -> None:
        assert residuals(problem, solved(problem)).max() < 1e-9

    def test_have_the_norm_that_they_state(self) -> None:
        for norm, orthogonal in ((0.9, False), (1.5, False), (1.2, True)):
            W = torch.from_numpy(problems.tanh(64, 1, norm, orthogonal=orthogonal).leaves["W"])
            assert float(torch.linalg.matrix_norm(W, 2)) == pytest.approx(norm, rel=1e-5)

    def test_treat_samples_apart(self, problem: problems.Problem) -> None:
        """So that peers may solve them one by one, with what `batch_dims` gives to each."""
        z = torch.randn(problem.shape)
        args = problem.torch_args()
        one = [a if dim is None else a.narrow(dim, 1, 1) for a, dim in zip(args, problem.batch_dims, strict=True)]
        torch.testing.assert_close(problem.torch_map(z[1:2], *one), problem.torch_map(z, *args)[1:2], rtol=1e-4, atol=1e-5)

    def test_tanh_of_numpy_is_that_of_torch(self) -> None:
        problem = SMALL["random"]()
        z, args = torch.randn(problem.shape), problem.torch_args()
        assert problem.numpy_map is not None
        found = problem.numpy_map(z.numpy(), *(a.numpy() for a in args))
        np.testing.assert_allclose(found, problem.torch_map(z, *args).numpy(), rtol=1e-5, atol=1e-5)

    def test_one_sample_is_much_harder_than_the_others(self) -> None:
        problem = problems.tanh(64, 32, 0.95, orthogonal=True, uneven=True)
        stopping = Stopping(rtol=1e-3)
        _, stats = fixed_point(problem.torch_map, torch.zeros(problem.shape), *problem.torch_args(), stopping=stopping)
        assert int(stats.steps.argmax()) == 16
        assert int(stats.steps[16]) > 2 * float(stats.steps.double().quantile(0.9))


class TestCheck:
    def test_passes_a_fixed_point_and_refuses_one_sample_that_is_off(self, problem: problems.Problem) -> None:
        z = solved(problem)
        assert verdict(problem, z, 1e-6).reached
        wrong = z.copy()
        wrong[1] *= 1.01
        found = verdict(problem, wrong, 1e-3)
        assert not found.reached
        assert found.share == 1 - 1 / len(z)
        assert found.residual > 1e-3

    def test_refuses_what_is_not_finite(self) -> None:
        problem = SMALL["random"]()
        z = solved(problem)
        z[0, 0] = np.nan
        assert not verdict(problem, z, 1e-3).reached
        assert verdict(problem, z, 1e-3).residual == math.inf

    def test_measures_in_float64(self) -> None:
        """At a tolerance that float32 cannot tell from nothing, a rounded fixed point is refused."""
        problem = SMALL["random"]()
        z = solved(problem)
        assert verdict(problem, z, 1e-9).reached
        assert not verdict(problem, z.astype(np.float32), 1e-9).reached

    def test_refuses_a_wrong_gradient_of_a_right_solution(self) -> None:
        problem = SMALL["random"]()
        z, exact = solved(problem), [np.ones((3, 3)), np.zeros(2)]
        for rtol, allowed in GRADIENT.items():
            for factor, reached in ((0.5, True), (2.0, False)):
                found = Found(z=z, evaluations=1, gradients=(exact[0] * (1 + factor * allowed), exact[1]))
                assert gradient_verdict(problem, found, rtol, exact).reached is reached
        missing = Found(z=z, evaluations=1, gradients=(np.full((3, 3), np.nan), exact[1]))
        assert not gradient_verdict(problem, missing, 1e-3, exact).reached


def judged(reached: Callable[[Found], bool]) -> Callable[[Found], Verdict]:
    return lambda found: Verdict(reached=reached(found), share=float(reached(found)), residual=float(found.z))


def asked(tolerance: float, *, exhausted: bool = False) -> Found:
    """A solver that returns its tolerance."""
    return Found(z=np.array(tolerance), evaluations=1, exhausted=exhausted)


class TestLoosest:
    @pytest.mark.parametrize("does", [2e-2, 1e-3, 3e-4, 2e-6])
    def test_comes_near_the_loosest_that_does(self, does: float) -> None:
        tolerance, found, checked = loosest(asked, judged(lambda found: bool(found.z <= does)), 1e-3)
        assert checked.reached
        assert found.z == tolerance
        assert does / 2 < tolerance <= does or tolerance >= 5e-3

    def test_says_so_where_none_does(self) -> None:
        assert not loosest(asked, judged(lambda found: False), 1e-3)[2].reached

    def test_gives_up_where_the_budget_is_spent(self) -> None:
        calls: list[float] = []

        def solve(tolerance: float) -> Found:
            calls.append(tolerance)
            return asked(tolerance, exhausted=True)

        assert not loosest(solve, judged(lambda found: False), 1e-3)[2].reached
        assert len(calls) == 1

    def test_takes_no_looser_one_where_the_tolerance_is_the_residual(self) -> None:
        assert loosest(asked, judged(lambda found: True), 1e-3, exact=True)[0] == 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_our_contenders_count_and_reach(name: str) -> None:
    problem = SMALL[name]()
    for contender in ours(lambda problem: False):
        if "graph" in contender.name or not contender.fits(problem):
            continue
        bound = contender.bind(problem, Scale(entry=1.0, sample=1.0, batch=1.0))
        found = bound.solve(1e-3, 300)
        assert verdict(problem, found.z, 1e-3).reached, contender.name
        assert found.evaluations is not None
        assert 1 < found.evaluations < 300
        bound.timed(1e-3, 300)()


def stored() -> list[Any]:
    result = json.loads(STORED.read_text(encoding="utf-8"))
    return [pytest.param(part, row, id=f"{part}-{row['key'][0]}-{row['rtol']:g}") for part in ("solve", "gradient") for row in result[part]]  # noqa: E501  # fmt: skip


@pytest.mark.parametrize(("part", "row"), stored())
def test_a_stored_time_is_that_of_a_right_result(part: str, row: dict[str, Any]) -> None:
    assert row["key"][0] in problems.SUITE
    for name, found in row["contenders"].items():
        assert (found["milliseconds"] is None) == (not found["reached"]), name
        if found["reached"]:
            assert found["residual"] <= ROUNDING * row["rtol"], name
            if part == "gradient":
                assert found["error_of_gradient"] <= GRADIENT[row["rtol"]], name
    for library, name in row["best"].items():
        assert row["contenders"][name]["library"] == library
        assert row["contenders"][name]["reached"]
    assert set(row["ratios"]) == (set(row["best"]) - {"equilibria"} if "equilibria" in row["best"] else set())
