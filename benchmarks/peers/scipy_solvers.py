"""For reference: scipy.optimize on f(z) - z of a whole batch, float64, at small sizes."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from peers.check import Found
from peers.contender import Bound, Contender, Scale
from peers.problems import Problem

optimize: Any = importlib.import_module("scipy.optimize")
SCIPY: dict[str, dict[str, Any]] = {
    "anderson": {"alpha": 1.0, "M": 5, "line_search": None},
    "broyden1": {"alpha": 1.0, "line_search": None},
    "newton_krylov": {"method": "lgmres"},
}


class Spent(Exception):
    """The budget."""


def _bind(name: str, options: dict[str, Any], problem: Problem, scale: Scale) -> Bound:
    f, args = problem.numpy_map, [np.array(arg).astype(np.float64) for arg in problem.torch_args()]
    assert f is not None

    def run(tolerance: float, budget: int) -> tuple[np.ndarray, int]:
        calls, last = 0, np.zeros(problem.shape)

        def g(z: np.ndarray) -> np.ndarray:
            nonlocal calls, last
            if calls >= budget:
                raise Spent
            calls, last = calls + 1, z
            return f(z, *args) - z

        try:
            z = getattr(optimize, name)(
                g, np.zeros(problem.shape), f_tol=tolerance, tol_norm=np.linalg.norm, maxiter=budget, **options
            )
        except (Spent, optimize.NoConvergence, ValueError, np.linalg.LinAlgError):
            z = last
        return np.asarray(z).reshape(problem.shape), calls

    def solve(tolerance: float, budget: int) -> Found:
        z, calls = run(tolerance, budget)
        return Found(z=z, evaluations=calls, exhausted=calls >= budget)

    timed: Callable[[float, int], Callable[[], Any]] = lambda tolerance, budget: partial(run, tolerance, budget)  # noqa: E731
    return Bound(solve=solve, timed=timed, base=lambda rtol: rtol * scale.batch)


def contenders() -> list[Contender]:
    return [
        Contender(
            name=name, library="scipy", bind=partial(_bind, name, options),
            fits=lambda problem: problem.numpy_map is not None and problem.small and problem.shape[0] <= 32,
        )
        for name, options in SCIPY.items()
    ]  # fmt: skip
