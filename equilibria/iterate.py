"""The only solve loop: budget, convergence of each sample, best iterate, trace, smaller batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from equilibria.solution import Status
from equilibria.solvers.solver import Solver, State
from equilibria.stopping import Stopping

RUNNING = -1
"""Status of a sample that is still being solved; none has it when `iterate` returns."""


class Solved(NamedTuple):
    """What `iterate` returns for a batch of B samples: tensors only, so that it can cross an autograd function."""

    z: Tensor
    """(B, D) the iterate with the smallest residual, or the one that converged."""
    residual: Tensor
    """(B,) norm of f(z) - z at that z."""
    relative: Tensor
    """(B,) residual over the norm of f(z)."""
    steps: Tensor
    """(B,) int64"""
    status: Tensor
    """(B,) int8"""
    trace: Tensor
    """(1 + steps, B), or (0, B) where none was asked for."""


class BudgetedMap:
    """z -> f(z, *args), counted; `rows` gives the map of some samples alone, where the caller allows it.

    batch_dims holds for each arg the dimension that carries the batch, or None; without it, the batch stays whole.
    `known` is f(z0), where it is known already: the first call returns it and is not counted.
    """

    def __init__(
        self,
        f: Callable[..., Tensor],
        args: Sequence[Tensor],
        max_evals: int,
        batch_dims: Sequence[int | None] | None = None,
        *,
        known: Tensor | None = None,
    ) -> None:
        self.f = f
        self.args = args
        self.batch_dims = batch_dims
        self.max_evals = max_evals
        self.known = known
        self.evaluations = 0
        self._parent: BudgetedMap | None = None

    def __call__(self, z: Tensor) -> Tensor:
        if self.known is not None:
            known, self.known = self.known, None
            return known
        counter: BudgetedMap | None = self
        while counter is not None:
            counter.evaluations += 1
            counter = counter._parent
        return self.f(z, *self.args)

    @property
    def remaining(self) -> int:
        return self.max_evals - self.evaluations

    def rows(self, rows: Tensor) -> BudgetedMap | None:
        """The map of these samples, or None where it is not known which args carry the batch."""
        if self.batch_dims is None:
            return None
        args = [
            arg if dim is None else arg.index_select(dim, rows) for arg, dim in zip(self.args, self.batch_dims, strict=True)
        ]
        smaller = BudgetedMap(self.f, args, self.max_evals, self.batch_dims)
        smaller.evaluations = self.evaluations
        smaller._parent = self
        return smaller


def iterate(solver: Solver[Any], f: BudgetedMap, z0: Tensor, stopping: Stopping) -> Solved:
    """Step until every sample has converged, failed or run out of budget.

    A sample is frozen when ‖f(z) - z‖ <= atol + rtol ‖f(z)‖: what is returned for it is that z, whatever its neighbours
    need. Once no more than half of the samples are left, they are solved in a batch of their own, if `f.rows` can.
    """
    state = solver.init(f, z0)
    record = _Record.start(state, stopping)
    trace = [record.residual]
    _run(solver, f, state, record, stopping, trace, 0)
    status = torch.where(record.status == RUNNING, int(Status.EXHAUSTED), record.status)
    relative = torch.where(record.residual > 0, record.residual / record.scale, record.residual)
    rows = torch.stack(trace) if stopping.trace else record.residual.new_zeros(0, len(record.residual))
    return Solved(record.z, record.residual, relative, record.steps, status, rows)


@dataclass
class _Record:
    """The best of each sample so far, and which samples still run."""

    z: Tensor
    residual: Tensor
    scale: Tensor
    steps: Tensor
    status: Tensor

    @staticmethod
    def start(state: State, stopping: Stopping) -> _Record:
        residual, scale = _measure(state, stopping)
        status = torch.full_like(residual, RUNNING, dtype=torch.int8)
        record = _Record(state.z, residual, scale, torch.zeros_like(residual, dtype=torch.int64), status)
        record._settle(record.running, residual, residual <= stopping.tolerance(scale))
        return record

    @property
    def running(self) -> Tensor:
        return self.status == RUNNING

    def update(self, state: State, stopping: Stopping) -> Tensor:
        """Take in one step of every sample, except those that are frozen. Returns the residuals (B,) for the trace."""
        running = self.running
        residual, scale = _measure(state, stopping)
        converged = residual <= stopping.tolerance(scale)
        better = running & (converged | (residual < self.residual))
        self.z = torch.where(better.unsqueeze(1), state.z, self.z)
        self.residual = torch.where(better, residual, self.residual)
        self.scale = torch.where(better, scale, self.scale)
        self.steps = self.steps + running
        self._settle(running, residual, converged)
        return torch.where(running, residual, self.residual)

    def _settle(self, running: Tensor, residual: Tensor, converged: Tensor) -> None:
        status = torch.where(converged, int(Status.CONVERGED), RUNNING)
        status = torch.where(residual.isfinite(), status, int(Status.NONFINITE)).to(torch.int8)
        self.status = torch.where(running, status, self.status)

    def take(self, rows: Tensor) -> _Record:
        return _Record(*(value.index_select(0, rows) for value in vars(self).values()))

    def put(self, rows: Tensor, part: _Record) -> None:
        for name, value in vars(part).items():
            setattr(self, name, getattr(self, name).index_copy(0, rows, value))


def _measure(state: State, stopping: Stopping) -> tuple[Tensor, Tensor]:
    """(‖f(z) - z‖, ‖f(z)‖) of every sample."""
    return stopping.norm(state.g.detach()), stopping.norm(state.fz.detach())


def _run(
    solver: Solver[Any],
    f: BudgetedMap,
    state: State,
    record: _Record,
    stopping: Stopping,
    trace: list[Tensor],
    step: int,
) -> None:
    """Step `state` until done; results go into `record`, residuals after each step into `trace`."""
    while f.remaining > 0:
        if step % stopping.check_every == 0:
            left = int(record.running.sum())
            if left == 0:
                return
            if 2 * left <= len(record.status):
                rows = record.running.nonzero().squeeze(1)
                smaller = f.rows(rows)
                if smaller is not None:
                    part = record.take(rows)
                    begin = len(trace)
                    part_trace: list[Tensor] = []
                    _run(solver, smaller, state.take(rows), part, stopping, part_trace, step)
                    trace[begin:] = [record.residual.index_copy(0, rows, residual) for residual in part_trace]
                    record.put(rows, part)
                    return
        state = solver.step(f, state)
        trace.append(record.update(state, stopping))
        step += 1
