"""Whole solves as released in 2019 and 2021: one stopping rule for the whole batch, and what the code reported of a solve.

The library's `Broyden` takes the same steps as the released one, and is what runs here; other steps are in steps.py. What
differs is around them: the norm is that of the whole batch, absolute in 2019, and a solve may be broken off. A sample's
answer depends on its batch, so that these serve for comparison and not for training.

Source: the code released with Bai, Kolter and Koltun, "Deep Equilibrium Models", 2019, and with Bai, Koltun and Kolter,
"Stabilizing Equilibrium Models by Jacobian Regularization", 2021.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from equilibria.interop.original.steps import ArmijoBroyden, ArmijoState, RidgeAnderson
from equilibria.iterate import BudgetedMap
from equilibria.solvers import Broyden, Solver
from equilibria.solvers.solver import State

Function = Callable[[Tensor], Tensor]


class Broyden2019(NamedTuple):
    """What the released Broyden of 2019 reported of a solve."""

    result: Tensor
    """Like x0: the iterate whose residual was lowest."""
    trace: list[float]
    """‖g‖₂ of the whole batch at x0 and after every step."""
    nstep: int
    tnstep: int
    """Steps, plus one for each cubic trial of the line search."""
    lowest_step: int
    diff: float
    """‖g‖₂ at the result."""
    diff_detail: Tensor
    """(B, L): ‖g‖₂ over channels."""
    prot_break: bool
    """Whether the solve was broken off because the residual grew."""
    evaluations: int
    iterates: list[Tensor]
    """x0 and every x after it."""


def broyden_2019(
    f: Function, x0: Tensor, *, threshold: int, eps: float, line_search: bool = False, last_if_none_better: bool = False
) -> Broyden2019:
    """Solve f(x) = x from x0 (B, d, L) as the released code did.

    It stops where ‖g‖₂ < eps over the whole batch, after `threshold` steps, where ‖g‖₂ < 3 eps and the last 30 differ by
    less than a factor of 1.3, or, broken off, where ‖g‖₂ > 10⁵ L times that at x0.

    Args:
        last_if_none_better: return the last iterate where none is better than x0, as the released code did by mistake;
            otherwise x0.

    >>> broyden_2019(torch.cos, torch.zeros(1, 1, 1), threshold=20, eps=1e-6).lowest_step
    5
    """
    run = _Run(f, x0, _steps_of_broyden(threshold, line_search))
    trace, iterates = [run.norm()], [x0]
    lowest, lowest_step, best = trace[0], 0, run.state
    broken = False
    while trace[-1] >= eps and len(trace) <= threshold:
        trace.append(run.step())
        iterates.append(run.state.z.view_as(x0))
        if trace[-1] < lowest:
            lowest, lowest_step, best = trace[-1], len(trace) - 1, run.state
        if _rests(trace, len(trace) - 1, eps):
            break
        broken = trace[-1] > trace[0] * 1e5 * x0.shape[-1]
        if broken:
            break
    if lowest_step == 0 and last_if_none_better:
        best = run.state
    g = best.g.view_as(x0)
    return Broyden2019(
        result=best.z.view_as(x0), trace=trace, nstep=len(trace) - 1, tnstep=len(trace) - 1 + run.trials(),
        lowest_step=lowest_step, diff=_norm(g), diff_detail=g.norm(dim=1), prot_break=broken, evaluations=run.f.evaluations,
        iterates=iterates,
    )  # fmt: skip


class Solve2021(NamedTuple):
    """What the released solvers of 2021 reported of a solve."""

    result: Tensor
    """Like x0: the x whose residual was lowest, and not f(x)."""
    abs_trace: list[float]
    """‖g‖₂ of the whole batch, padded with the lowest; the first is not at x0."""
    rel_trace: list[float]
    """The same over ‖f(x)‖₂."""
    lowest: float
    """In the mode that stops."""
    nstep: int
    """The step of it."""
    prot_break: bool


Mode = Literal["abs", "rel"]


def broyden_2021(
    f: Function, x0: Tensor, *, threshold: int, eps: float, stop_mode: Mode = "rel", line_search: bool = False
) -> Solve2021:
    """Solve f(x) = x from x0 (B, d, L) as the code of 2021 did: residuals relative to ‖f(x)‖₂, or absolute.

    >>> broyden_2021(torch.cos, torch.zeros(1, 1, 1), threshold=20, eps=1e-6).nstep
    5
    """
    run = _Run(f, x0, _steps_of_broyden(threshold, line_search))
    record = _Record2021(run, stop_mode, floor=1e-9)
    broken = False
    for step in range(1, threshold + 1):
        run.step()
        record.take(step)
        trace = record.traces[stop_mode]
        if trace[-1] < eps or _rests(trace, step, eps):
            break
        broken = trace[-1] > trace[0] * (1e6 if stop_mode == "abs" else 1e3) * x0.shape[-1]
        if broken:
            break
    return record.solve(threshold + 1, broken)


def anderson_2021(
    f: Function,
    x0: Tensor,
    *,
    threshold: int,
    eps: float,
    stop_mode: Mode = "rel",
    history: int = 6,
    ridge: float = 1e-4,
    damping: float = 1.0,
) -> Solve2021:
    """Solve f(x) = x from x0 (B, d, L) as the code of 2021 did; the first residual recorded is that of step 2.

    >>> anderson_2021(torch.cos, torch.zeros(1, 1, 1), threshold=20, eps=1e-6).prot_break
    False
    """
    run = _Run(f, x0, RidgeAnderson(history=history, ridge=ridge, damping=damping))
    record = _Record2021(run, stop_mode, floor=1e-5)
    run.step()
    for step in range(2, threshold):
        run.step()
        record.take(step)
        if record.traces[stop_mode][-1] < eps:
            break
    return record.solve(threshold - 2, False)


class _Run:
    """A solver stepped from outside."""

    def __init__(self, f: Function, x0: Tensor, solver: Solver[Any]) -> None:
        self.f = BudgetedMap(lambda z: f(z.view_as(x0)).flatten(1), (), max_evals=2**62)
        self.x0 = x0
        self.solver = solver
        self.state: State = solver.init(self.f, x0.flatten(1))

    def step(self) -> float:
        self.state = self.solver.step(self.f, self.state)
        return self.norm()

    def norm(self) -> float:
        return _norm(self.state.g)

    def trials(self) -> int:
        return self.state.trials if isinstance(self.state, ArmijoState) else 0


class _Record2021:
    def __init__(self, run: _Run, mode: Mode, floor: float) -> None:
        self.run, self.floor = run, floor
        self.mode: Mode = mode
        self.traces: dict[Mode, list[float]] = {"abs": [], "rel": []}
        self.lowest: dict[Mode, float] = {"abs": 1e8, "rel": 1e8}
        self.step, self.best = 0, run.state

    def take(self, step: int) -> None:
        size = self.run.norm()
        found: dict[Mode, float] = {"abs": size, "rel": size / (_norm(self.run.state.fz) + self.floor)}
        for mode, value in found.items():
            self.traces[mode].append(value)
            if value < self.lowest[mode]:
                self.lowest[mode] = value
                if mode == self.mode:
                    self.step, self.best = step, self.run.state

    def solve(self, length: int, broken: bool) -> Solve2021:
        absolute, relative = self._padded("abs", length), self._padded("rel", length)
        result = self.best.z.view_as(self.run.x0)
        return Solve2021(result, absolute, relative, self.lowest[self.mode], self.step, broken)

    def _padded(self, mode: Mode, length: int) -> list[float]:
        trace = self.traces[mode]
        return trace + [self.lowest[mode]] * (length - len(trace))


def _steps_of_broyden(threshold: int, line_search: bool) -> Broyden:
    history = max(threshold, 1)  # every step is remembered
    return ArmijoBroyden(history=history) if line_search else Broyden(history=history)


def _rests(trace: list[float], step: int, eps: float) -> bool:
    last = trace[-30:]
    return trace[-1] < 3.0 * eps and step > 30 and max(last) < 1.3 * min(last)


def _norm(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x))
