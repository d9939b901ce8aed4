"""Looks at whole solves: residual after residual, far below the tolerance."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from equilibria.data import Split
from equilibria.solution import Stats
from equilibria.stopping import Stopping


@torch.no_grad()
def trace_solve(
    model: Any, split: Split, stopping: Stopping, *, batch_size: int, length: int, device: torch.device, plain: Any = None
) -> Stats:
    """The statistics of a solve with `stopping` on the second segment of a split, the first with a memory.

    `plain` is the model without what wraps it, if anything does. It is left as it was, and no random number is drawn; a
    solve that becomes infinite or NaN is a result as any other.
    """
    batches = split.batches(max(1, min(batch_size, split.max_batch_size)), length, device)
    deq, training = (model if plain is None else plain).deq, model.training
    usual = deq.eval_stopping, deq.raise_nonfinite
    deq.eval_stopping, deq.raise_nonfinite = dataclasses.replace(stopping, trace=True), False
    model.eval()
    memory, stats = None, []
    try:
        for index in range(min(2, len(batches))):
            output = model(*batches[index], memory)
            memory, stats = output.memory if batches.carries_memory else None, output.stats
    finally:
        deq.eval_stopping, deq.raise_nonfinite = usual
        model.train(training)
    return stats[-1]


def relative_trace(stats: Stats) -> Tensor:
    """(1 + steps, B) the residuals of a traced solve, ‖f(z) - z‖ / ‖f(z*)‖."""
    assert stats.trace is not None
    scale = torch.where(stats.relative > 0, stats.residual / stats.relative, 1.0)  # (B,) ‖f(z*)‖
    return stats.trace.double() / scale.double()


def trace_row(stats: Stats) -> dict[str, Any]:
    """The trace as a row of traces.jsonl: after each step the median and the largest over samples, and what it cost."""
    trace = relative_trace(stats).nan_to_num(posinf=1e30).clamp(max=1e30)
    median, worst = trace.median(dim=1).values, trace.amax(dim=1)
    rounded = {"median": _digits(median), "worst": _digits(worst)}
    return {**rounded, "evaluations": stats.evaluations, "samples": trace.shape[1]}


def _digits(values: Tensor) -> list[float]:
    return [float(f"{value:.4g}") for value in values.tolist()]
