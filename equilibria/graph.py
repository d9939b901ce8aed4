"""The whole solve as one graph: what `fixed_point` does while torch.compile traces it.

Imported only then, for it needs the compiler, which takes as long to import as the rest of torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import fields
from typing import Any, cast

import torch
from torch import Tensor
from torch._higher_order_ops.while_loop import while_loop
from torch.utils._pytree import tree_map_only

from equilibria.declared import autocast_now
from equilibria.iterate import BudgetedMap, Loop, Record
from equilibria.solution import Solution, Stats
from equilibria.solvers import Solver
from equilibria.solvers.solver import State
from equilibria.stopping import Stopping
from equilibria.structure import layout_of


def solve_in_graph(
    f: Callable[..., Any],
    z0: Any,
    args: Sequence[Any],
    solver: Solver[Any],
    stopping: Stopping,
    eager: Callable[[], Solution],
) -> Solution:
    """The solve as a loop inside the graph that is being traced, or `eager()` outside of it where that cannot be.

    The same steps as the eager loop takes, on the whole batch; f is not probed, and no status raises.
    """
    if not getattr(solver, "traceable", False) or stopping.trace:
        return _outside_for_its_steps(eager)
    layout = layout_of(z0)
    autocast = autocast_now(layout.device)

    def flat(z: Tensor) -> Tensor:
        """f on (B, D); a copy, since a loop must not return what it was given, in another form or as a part."""
        with autocast or nullcontext():
            output = f(layout.unpack(z), *args)
        if autocast is not None:
            output = tree_map_only(Tensor, lambda leaf: leaf.to(layout.dtype), output)
        return _copy(layout.pack_output(output, layout.batch))

    start = layout.pack(z0).detach()
    known = flat(start)
    if known.requires_grad:
        return _outside_for_gradients(eager)
    plain = nullcontext() if autocast is None else torch.autocast(layout.device.type, enabled=False)
    with torch.no_grad(), plain:
        record, evaluations = _loop(solver, flat, start, known, stopping)
        solved = record.solved(stopping)
    stats = Stats(
        residual=solved.residual,
        relative=solved.relative,
        evaluations=cast(int, evaluations.item()),
        steps=solved.steps,
        status=solved.status,
    )
    return Solution(layout.unpack(solved.z), stats)


def _loop(
    solver: Solver[Any], f: Callable[[Tensor], Tensor], z0: Tensor, known: Tensor, stopping: Stopping
) -> tuple[Record, Tensor]:
    """The record of every sample at the end, and the evaluations spent."""
    loop = Loop(solver, stopping)
    state, record = loop.start(BudgetedMap(f, (), stopping.max_evals, known=known), z0)
    kind = type(state)
    names = [field.name for field in fields(state)]

    def unfinished(evaluations: Tensor, values: list[Tensor], best: list[Tensor]) -> Tensor:
        return (evaluations < stopping.max_evals) & Record(*best, trace=[]).running.any()

    def advance(evaluations: Tensor, values: list[Tensor], best: list[Tensor]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        counted = BudgetedMap(f, (), stopping.max_evals)
        record = Record(*best, trace=[])
        state = loop.advance(counted, kind(**dict(zip(names, values, strict=True))), record)
        return evaluations + counted.evaluations, _apart(_values(state, names), values), _best(record)

    carried = (
        torch.ones((), dtype=torch.int64, device=z0.device),
        [_copy(value) for value in _values(state, names)],
        [_copy(value) for value in _best(record)],
    )
    evaluations, _, best = while_loop(unfinished, advance, carried)
    return Record(*best, trace=[]), evaluations


def _values(state: State, names: Sequence[str]) -> list[Tensor]:
    """The fields of a solver's state as tensors: counts are carried as such through a compiled loop."""
    state = state.with_tensor_counts()
    return [getattr(state, name) for name in names]


def _best(record: Record) -> list[Tensor]:
    return [record.z, record.residual, record.scale, record.steps, record.status, record.running]


def _copy(value: Tensor) -> Tensor:
    return value.clone(memory_format=torch.contiguous_format)


def _apart(values: Sequence[Tensor], taken: Sequence[Tensor]) -> list[Tensor]:
    """The same values, none of them a tensor that is taken or comes twice, all with the strides that follow from their
    shapes: what a loop carries must be so."""
    taken = list(taken)
    result = []
    for value in values:
        fresh = value.clone() if any(value is other for other in taken) else value
        taken.append(value)
        result.append(fresh.reshape(-1).view(value.shape))  # contiguous() spares the strides of dimensions of size 1
    return result


@torch.compiler.disable(
    reason="gradients through a solve cannot be traced: compile the map alone, f = torch.compile(f) or block.compile(), "
    "and leave fixed_point to run eagerly, or solve under torch.no_grad()"
)
def _outside_for_gradients(eager: Callable[[], Solution]) -> Solution:
    return eager()


@torch.compiler.disable(
    reason="only Picard(), ReversiblePicard(), Anderson() and Broyden() without line search, and no Stopping(trace=True), "
    "can be traced as one graph: use one of those, or compile the map alone: f = torch.compile(f) or block.compile()"
)
def _outside_for_its_steps(eager: Callable[[], Solution]) -> Solution:
    return eager()
