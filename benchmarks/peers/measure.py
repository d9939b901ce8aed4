"""One row of the suite: every contender on one problem to one tolerance, checked, then timed in turn."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from harness import interleaved, median_ratio

from equilibria import Anderson, Stopping, fixed_point
from peers.check import Found, Verdict, gradient_verdict, loosest, verdict
from peers.contender import Bound, Contender, Scale
from peers.problems import Problem

SECONDS, MOST_ROUNDS, LEAST_ROUNDS = 3.0, 51, 5
"""What the rounds of one row may take, and how many they are."""
FINALISTS = 3
"""Of each library, so many of the fastest are timed in turn; which they are is told from a few solves of each."""


@dataclass(kw_only=True)
class Result:
    """Of one contender in one row."""

    contender: Contender
    verdict: Verdict | None
    evaluations: int | None
    tolerance: float | None
    first_seconds: float
    """The first solve, in which JAX and torch.compile compile."""
    products: int | None = None
    failure: str | None = None
    run: Callable[[], Any] | None = None
    seconds: float | None = None

    @property
    def reached(self) -> bool:
        return self.verdict is not None and self.verdict.reached

    def row(self) -> dict[str, Any]:
        checked = self.verdict
        return {
            "library": self.contender.library,
            "reached": self.reached,
            "share": checked.share if checked else 0.0,
            "residual": _finite(checked.residual if checked else None),
            "evaluations": self.evaluations,
            "products": self.products,
            "error_of_gradient": _finite(checked.error if checked else None),
            "tolerance": self.tolerance,
            "first_seconds": self.first_seconds,
            "milliseconds": None if self.seconds is None else 1e3 * self.seconds,
            "failure": self.failure,
        }


def _finite(value: float | None) -> float | None:
    return value if value is not None and np.isfinite(value) else None


def scale_of(problem: Problem) -> Scale:
    """From a solve in float64, as near to a fixed point as it comes: no more than the size of tolerances rests on it."""
    with torch.no_grad():
        args, z0 = problem.torch_args(torch.float64), torch.zeros(problem.shape, dtype=torch.float64)
        stopping = Stopping(rtol=1e-7, max_evals=3000)
        z, _ = fixed_point(problem.torch_map, z0, *args, solver=Anderson(history=40), stopping=stopping)
    norms = z.flatten(1).norm(dim=1)
    return Scale(entry=float(z.square().mean().sqrt()), sample=float(norms.min()), batch=float(norms.norm()))


def bind_all(problem: Problem, contenders: Sequence[Contender]) -> dict[Contender, Bound]:
    scale = scale_of(problem)
    return {c: c.bind(problem, scale) for c in contenders if c.fits(problem)}


Judge = Callable[[Found], Verdict]


def search(problem: Problem, contender: Contender, bound: Bound, rtol: float, judge: Judge) -> Result:
    """The contender asked for just so much that the judge is content."""
    start = time.perf_counter()
    first: list[float] = []

    def solve(tolerance: float) -> Found:
        found = bound.solve(tolerance, problem.budget)
        first.append(time.perf_counter() - start)
        return found

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of overflow, of convergence: what counts is the residual
            tolerance, found, checked = loosest(solve, judge, bound.base(rtol), exact=contender.exact)
    except Exception as error:  # a peer's failure is a result: the row names it
        return Result(
            contender=contender, verdict=None, evaluations=None, tolerance=None,
            first_seconds=time.perf_counter() - start, failure=f"{type(error).__name__}: {error}".splitlines()[0][:120],
        )  # fmt: skip
    result = Result(
        contender=contender, verdict=checked, evaluations=found.evaluations, products=found.products, tolerance=tolerance,
        first_seconds=first[0],
    )  # fmt: skip
    if checked.reached:
        result.run = bound.timed(tolerance, _budget(problem, contender, bound, found, tolerance, judge))
    return result


def _budget(problem: Problem, contender: Contender, bound: Bound, found: Found, tolerance: float, judge: Judge) -> int:
    """TorchDEQ's records are as long as its budget, so it is given no larger one than it needs."""
    if contender.library == "torchdeq" and found.evaluations is not None:
        tight = bound.solve(tolerance, found.evaluations)
        if judge(tight).reached and tight.evaluations == found.evaluations:
            return found.evaluations
    return problem.budget


def time_all(results: Sequence[Result]) -> dict[str, Any]:
    """Fill in the times; the ratios to the best of each library."""
    reached = [r for r in results if r.run is not None]
    for result in reached:
        result.seconds = _roughly(result.run)
    finalists: list[Result] = []
    for library in {r.contender.library for r in reached}:
        those = sorted((r for r in reached if r.contender.library == library), key=lambda r: r.seconds or 0.0)
        finalists += those[:FINALISTS]
    runs = {f"{r.contender.library} {r.contender.name}": r.run for r in finalists if r.run is not None}
    once = sum(r.seconds or 0.0 for r in finalists)
    rounds = max(LEAST_ROUNDS, min(MOST_ROUNDS, int(SECONDS / max(once, 1e-9))))
    seconds = interleaved(runs, rounds) if runs else {}
    best: dict[str, str] = {}
    for result in finalists:
        key = f"{result.contender.library} {result.contender.name}"
        result.seconds = statistics.median(seconds[key])
        library = result.contender.library
        if library not in best or statistics.median(seconds[best[library]]) > result.seconds:
            best[library] = key
    ratios = {}
    if "equilibria" in best:
        ours = seconds[best["equilibria"]]
        ratios = {name: median_ratio(seconds[key], ours) for name, key in best.items() if name != "equilibria"}
    return {"rounds": rounds, "best": best, "ratios": ratios}


def _roughly(run: Callable[[], Any] | None) -> float:
    """Seconds of the fastest of five solves, fewer where that takes long."""
    assert run is not None
    run()
    found = []
    while len(found) < 5 and sum(found) < 0.5:
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return min(found)


def rows(problem: Problem, bound: dict[Contender, Bound], judges: Mapping[float, Judge]) -> list[dict[str, Any]]:
    """One for each rtol in `judges`: first every search, then every timing."""
    found = {
        rtol: [search(problem, contender, how, rtol, judge) for contender, how in bound.items()]
        for rtol, judge in judges.items()
    }
    return [
        {
            "problem": problem.name,
            "rtol": rtol,
            "budget": problem.budget,
            **times,
            "contenders": {f"{r.contender.library} {r.contender.name}": r.row() for r in found[rtol]},
        }
        for rtol, times in time_rows(found).items()
    ]


def time_rows(found: Mapping[float, Sequence[Result]]) -> dict[float, dict[str, Any]]:
    return {rtol: time_all(results) for rtol, results in found.items()}


def of_solve(problem: Problem, rtol: float) -> Judge:
    return lambda found: verdict(problem, found.z, rtol)


def of_gradient(problem: Problem, exact: Sequence[np.ndarray], rtol: float) -> Judge:
    """`exact` are the gradients of a float64 solve."""
    return lambda found: gradient_verdict(problem, found, rtol, exact)
