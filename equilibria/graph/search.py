"""The loop of a solve inside a graph: the steps of `equilibria.iterate`, as torch's while_loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from torch._higher_order_ops.while_loop import while_loop

from equilibria.declared import autocast_now
from equilibria.iterate import BudgetedMap, Loop, Record, Solved
from equilibria.solvers import Solver
from equilibria.solvers.solver import State
from equilibria.stopping import Stopping


@torch.no_grad()
def search(
    solver: Solver[Any], f: Callable[[Tensor], Tensor], z0: Tensor, known: Tensor, stopping: Stopping
) -> tuple[Solved, Tensor]:
    """The fixed point of f on (B, D), searched from z0, where f(z0) is `known`; and the evaluations spent."""
    autocast = autocast_now(z0.device)
    with nullcontext() if autocast is None else torch.autocast(z0.device.type, enabled=False):
        # A copy, since a loop must not return what it was given, in another form or as a part.
        record, evaluations = _loop(solver, lambda z: _copy(f(z)), z0, _copy(known), stopping)
        return record.solved(stopping), evaluations


def _loop(
    solver: Solver[Any], f: Callable[[Tensor], Tensor], z0: Tensor, known: Tensor, stopping: Stopping
) -> tuple[Record, Tensor]:
    """The record of every sample at the end, and the evaluations spent."""
    loop = Loop(solver, stopping)
    state, record = loop.start(BudgetedMap(f, (), stopping.max_evals, known=known), z0)
    kind = type(state)
    absent: dict[str, Any] = {field.name: None for field in fields(state) if getattr(state, field.name) is None}
    names = [field.name for field in fields(state) if field.name not in absent]

    def unfinished(evaluations: Tensor, values: list[Tensor], best: list[Tensor]) -> Tensor:
        return (evaluations < stopping.max_evals) & Record(*best, trace=[]).running.any()

    def advance(evaluations: Tensor, values: list[Tensor], best: list[Tensor]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        counted = BudgetedMap(f, (), stopping.max_evals)
        record = Record(*best, trace=[])
        state = loop.advance(counted, kind(**dict(zip(names, values, strict=True)), **absent), record)
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
        one_row = value.dim() == 2 and len(value) == 1  # of a wider one, perhaps, and contiguous() lets it pass as it is
        fresh = _copy(value) if one_row or any(value is other for other in taken) else value
        taken.append(value)
        result.append(
            fresh.contiguous().reshape(-1).view(value.shape)
        )  # contiguous() alone spares the strides of dimensions of size 1
    return result
