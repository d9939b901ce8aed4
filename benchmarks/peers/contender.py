"""A contender: one solver of one library with one set of options, bound to a problem."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from peers.check import Found
from peers.problems import Problem


@dataclass(frozen=True, kw_only=True)
class Bound:
    """A contender that holds a problem's arrays in its own form."""

    solve: Callable[[float, int], Found]
    """(tolerance, budget) -> what is found; not timed, so it may count."""
    timed: Callable[[float, int], Callable[[], Any]]
    """(tolerance, budget) -> what is timed: the same solve, finished when it returns."""
    base: Callable[[float], float]
    """rtol -> the library's own tolerance that comes nearest to it."""


@dataclass(frozen=True, kw_only=True)
class Contender:
    name: str
    library: str
    bind: Callable[[Problem, Any], Bound]
    """(problem, typical size of a solution: see `Scale`) -> the contender on that problem."""
    exact: bool = False
    """Its tolerance is the relative residual itself."""
    fits: Callable[[Problem], bool] = lambda problem: True
    """Whether it can be run on a problem at all: dense Jacobians, say, are for small ones."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How large the fixed point is, for libraries with absolute tolerances."""

    entry: float
    """Root mean square of the entries."""
    sample: float
    """‖z‖₂ of the smallest sample."""
    batch: float
    """‖z‖₂ of all samples together."""
