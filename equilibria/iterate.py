"""The only solve loop: budget, convergence of each sample, best iterate, trace, smaller batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from equilibria.products import linearize
from equilibria.solution import Status
from equilibria.solvers.solver import Solver, State
from equilibria.stopping import Stopping
from equilibria.transforms import blind


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
    """z -> f(z, *args), counted; `rows` gives the map of some samples alone.

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
        self._count()
        return self.f(z, *self.args)

    def linearize(self, z: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """f(z) and the map v -> J v, J = ∂f/∂z at z; each product counts as one evaluation, as f(z) does."""
        self._count()
        fz, push = linearize(lambda z: self.f(z, *self.args), z)

        def product(v: Tensor) -> Tensor:
            self._count()
            return push(v)

        return fz, product

    def _count(self) -> None:
        counter: BudgetedMap | None = self
        while counter is not None:
            counter.evaluations += 1
            counter = counter._parent

    @property
    def remaining(self) -> int:
        return self.max_evals - self.evaluations

    def rows(self, rows: Tensor) -> BudgetedMap:
        """The map of these samples alone; only where it is known which args carry the batch."""
        dims = self.batch_dims or ()
        args = [a if dim is None else a.index_select(dim, rows) for a, dim in zip(self.args, dims, strict=True)]
        smaller = BudgetedMap(self.f, args, self.max_evals, self.batch_dims)
        smaller.evaluations = self.evaluations
        smaller._parent = self
        return smaller


Watch = Callable[[State, Tensor, Tensor], None]
"""Told after the start and after every step: the state of the solver, which samples (B,) have there their best iterate, and
which (B,) still run."""


def iterate(solver: Solver[Any], f: BudgetedMap, z0: Tensor, stopping: Stopping, watch: Watch | None = None) -> Solved:
    """Step until every sample has converged, failed or run out of budget.

    A sample is frozen when ‖f(z) - z‖ <= atol + rtol ‖f(z)‖: what is returned for it is that z, whatever its neighbours
    need. Once no more than half of the samples are left, they are solved in a batch of their own, if it is known which args
    carry the batch; with a `watch`, the batch stays whole.
    """
    loop = Loop(solver, stopping, watch)
    state, record = loop.start(f, z0)
    loop.run(f, state, record, 0)
    return record.solved(stopping)


@dataclass(frozen=True)
class Loop:
    """A solver on its way: `start`, then `advance` step by step, or `run` to the end."""

    solver: Solver[Any]
    stopping: Stopping
    watch: Watch | None = None

    def start(self, f: BudgetedMap, z0: Tensor) -> tuple[State, Record]:
        state = self.solver.init(f, z0)
        record = Record.start(state, self.stopping)
        if self.watch is not None:
            self.watch(state, torch.ones_like(record.running), record.running)
        return state, record

    def advance(self, f: BudgetedMap, state: State, record: Record) -> State:
        """One step; what it found goes into `record`."""
        state = self.solver.step(f, state)
        better = record.update(state, self.stopping)
        if self.watch is not None:
            self.watch(state, better, record.running)
        return state

    def run(self, f: BudgetedMap, state: State, record: Record, step: int) -> None:
        """Step until done, looking every `check_every` steps at which samples still run."""
        while f.remaining > 0:
            if step % self.stopping.check_every == 0:
                left = record.left()
                if left == 0:
                    return
                if 2 * left <= len(record.status) and f.batch_dims is not None and self.watch is None:
                    rows = record.running.nonzero().squeeze(1)
                    part = record.take(rows)
                    self.run(f.rows(rows), state.take(rows), part, step)
                    record.put(rows, part)
                    return
            state = self.advance(f, state, record)
            step += 1


@dataclass
class Record:
    """The best of each sample so far, and which samples still run."""

    z: Tensor
    residual: Tensor
    scale: Tensor
    steps: Tensor
    status: Tensor
    running: Tensor
    trace: list[Tensor]
    """(B,) residuals at the start and after every step."""
    sighted: bool = False
    """Whether values of tensors may be asked for at no cost: a CPU answers faster than it moves data, an accelerator would
    have to wait."""
    counted: int | None = None
    """Samples that still run, where that is known."""

    @staticmethod
    def start(state: State, stopping: Stopping) -> Record:
        residual, scale = _measure(state, stopping)
        for value in (residual, scale):
            if value.shape != state.z.shape[:1]:
                raise ValueError(
                    f"Stopping(norm={stopping.norm}) made a tensor of shape {tuple(value.shape)} of a residual of shape "
                    f"{tuple(state.z.shape)}; it must return one number for each sample, (B, D) -> (B,), such as "
                    "equilibria.stopping.rms does"
                )
        steps = torch.zeros_like(residual, dtype=torch.int64)
        running = torch.ones_like(residual, dtype=torch.bool)
        sighted = residual.device.type == "cpu" and not blind()
        record = Record(state.z, residual, scale, steps, steps.to(torch.int8), running, [residual], sighted, len(residual))
        finite = _finite(residual, scale)
        record._settle(finite, finite & (residual <= stopping.tolerance(scale)))
        return record

    def update(self, state: State, stopping: Stopping) -> Tensor:
        """Take in one step of every sample, except those that are frozen. Returns whose best iterate (B,) it is."""
        residual, scale = _measure(state, stopping)
        tolerance = stopping.tolerance(scale)
        if stopping.trace:
            self.trace.append(torch.where(self.running, residual, self.residual))
        if self._usual(residual, tolerance):
            self.z, self.residual, self.scale = state.z, residual, scale
            self.steps = self.steps + 1
            return self.running
        finite = _finite(residual, scale)
        converged = finite & (residual <= tolerance)
        better = self.running & (converged | (residual < self.residual))
        if not (self.sighted and not bool(better.any())):
            self.z = torch.where(better.unsqueeze(1), state.z, self.z)
            self.residual = torch.where(better, residual, self.residual)
            self.scale = torch.where(better, scale, self.scale)
        self.steps = self.steps + self.running
        self._settle(finite, converged)
        return better

    def _usual(self, residual: Tensor, tolerance: Tensor) -> bool:
        """Whether every sample runs, came closer and has not arrived, which moves no data; false for NaN and inf."""
        if not self.sighted or self.counted != len(self.status):
            return False
        return bool(((residual < self.residual) & (residual > tolerance)).all())

    def left(self) -> int:
        """How many samples still run."""
        if self.counted is None:
            self.counted = int(self.running.sum())
        return self.counted

    def _settle(self, finite: Tensor, converged: Tensor) -> None:
        """Freeze the running samples that converged or failed."""
        settled = self.running & (converged | ~finite)
        if self.sighted and not bool(settled.any()):
            return
        status = torch.where(finite, int(Status.CONVERGED), int(Status.NONFINITE)).to(torch.int8)
        self.status = torch.where(settled, status, self.status)
        self.running = self.running & ~settled
        self.counted = None

    def copy(self) -> Record:
        return replace(self, trace=list(self.trace))

    def take(self, rows: Tensor) -> Record:
        """The record of some samples alone, with an empty trace."""
        tensors = {name: value.index_select(0, rows) for name, value in self._tensors().items()}
        return replace(self, trace=[], counted=len(rows), **tensors)

    def put(self, rows: Tensor, part: Record) -> None:
        """Take in the record of some samples, and what it traced, as more steps of all."""
        self.trace += [self.residual.index_copy(0, rows, residual) for residual in part.trace]
        for name, value in part._tensors().items():
            setattr(self, name, getattr(self, name).index_copy(0, rows, value))
        self.counted = None

    def _tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def solved(self, stopping: Stopping) -> Solved:
        status = torch.where(self.running, int(Status.EXHAUSTED), self.status)
        relative = ratio(self.residual, self.scale)
        trace = torch.stack(self.trace) if stopping.trace else self.residual.new_zeros(0, len(self.residual))
        return Solved(self.z, self.residual, relative, self.steps, status, trace)


def ratio(residual: Tensor, scale: Tensor) -> Tensor:
    """residual / scale, and 0 where the residual is 0."""
    return torch.where(residual == 0, residual, residual / scale)


def _finite(residual: Tensor, scale: Tensor) -> Tensor:
    """False for NaN too. Where the norm of f(z) overflows, any residual would be below rtol times it."""
    return (residual < float("inf")) & (scale < float("inf"))


def _measure(state: State, stopping: Stopping) -> tuple[Tensor, Tensor]:
    """(‖f(z) - z‖, ‖f(z)‖) of every sample."""
    return stopping.norm(state.g.detach()), stopping.norm(state.fz.detach())
