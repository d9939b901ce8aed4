"""What a contender returned is measured anew, in float64, before it is timed; and how tight it must be asked to be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from peers.problems import Problem

ROUNDING = 1.01
"""A residual in float32 and the same in float64 may differ by this factor."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a contender made of a problem."""

    z: np.ndarray
    evaluations: int | None
    """Calls of f, and products with its Jacobian; None where the library does not tell."""
    exhausted: bool = False
    """The budget is spent: a tighter tolerance would give the same."""
    products: int | None = None
    """Vector-Jacobian products of the backward solve."""
    gradients: tuple[np.ndarray, ...] | None = None
    """Of <w, z> in the leaves."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A result that was checked."""

    reached: bool
    share: float
    """Of the samples whose residual is within the tolerance."""
    residual: float
    """Relative, of the worst sample."""
    error: float | None = None
    """Of the gradient, relative, of the worst leaf."""


def residuals(problem: Problem, z: np.ndarray) -> np.ndarray:
    """(B,) ‖f(z) - z‖ / ‖f(z)‖ of every sample, f in float64; infinite where z is not finite."""
    state = torch.from_numpy(np.array(z)).double().reshape(problem.shape)
    with torch.no_grad():
        fz = problem.torch_map(state, *problem.torch_args(torch.float64))
    relative = (fz - state).flatten(1).norm(dim=1) / fz.flatten(1).norm(dim=1)
    return relative.nan_to_num(nan=np.inf).numpy()


def verdict(problem: Problem, z: np.ndarray, rtol: float) -> Verdict:
    found = residuals(problem, z)
    within = found <= ROUNDING * rtol
    return Verdict(reached=bool(within.all()), share=float(within.mean()), residual=float(found.max()))


GRADIENT = {1e-3: 1e-2, 1e-6: 1e-4}
"""rtol -> how far a gradient may be from that of a float64 solve, relative to it: what z is off is magnified there."""


def gradient_verdict(problem: Problem, found: Found, rtol: float, exact: Sequence[np.ndarray]) -> Verdict:
    assert found.gradients is not None
    solved = verdict(problem, found.z, rtol)
    pairs = [(g.astype(np.float64), e) for g, e in zip(found.gradients, exact, strict=True) if np.linalg.norm(e) > 0]
    error = max(float(np.nan_to_num(np.linalg.norm(g - e) / np.linalg.norm(e), nan=np.inf)) for g, e in pairs)
    return replace(solved, reached=solved.reached and error <= GRADIENT[rtol], error=error)


def loosest(
    solve: Callable[[float], Found], judge: Callable[[Found], Verdict], base: float, *, exact: bool = False
) -> tuple[float, Found, Verdict]:
    """The loosest tolerance, from 3 times `base` to a thousandth of it, whose result is right; or the best that was found.

    What a library's own test measures may differ from the residual (absolute, of the whole batch, of the step before), and
    then neither `base` nor any fixed factor of it would time the same result. `exact`: `base` itself measures the residual,
    so that nothing looser can do.
    """
    best: tuple[float, Found, Verdict] | None = None
    for power in range(0 if exact else -1, 7):
        tolerance = base * STEP**-power
        found = solve(tolerance)
        now = judge(found)
        if best is None or (now.share, -now.residual) > (best[2].share, -best[2].residual):
            best = tolerance, found, now
        if now.reached:
            return best if exact and power == 0 else _loosened(solve, judge, (tolerance, found, now))
        if found.exhausted or not np.isfinite(found.z).all():
            break  # a tighter tolerance gives the same
    assert best is not None
    return best


STEP = 10**0.5


def _loosened(
    solve: Callable[[float], Found], judge: Callable[[Found], Verdict], best: tuple[float, Found, Verdict]
) -> tuple[float, Found, Verdict]:
    """Between the first tolerance that does and the one before it, halved twice."""
    does, does_not = 0.0, 1.0
    start = best[0]
    for _ in range(2):
        power = (does + does_not) / 2
        found = solve(start * STEP**power)
        now = judge(found)
        if now.reached:
            best, does = (start * STEP**power, found, now), power
        else:
            does_not = power
    return best
