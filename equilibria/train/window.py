"""Means over the steps between two rows of metrics."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from equilibria.solution import Stats
from equilibria.train.solves import FIELDS, SolveMeter, solve_means


class Window:
    """Loss, gradient, speed and solves of the latest steps, as plain sums.

    Every figure of a row is one sum over another, so that several processes add up their `sums()`, and `row` of the total
    is that of the whole job.
    """

    def __init__(self) -> None:
        self.forward, self.backward = SolveMeter(), SolveMeter()
        self.clear()

    def clear(self) -> None:
        """Start anew."""
        self._loss, self.segments = 0.0, 0
        self._norm, self._clipped, self._steps = 0.0, 0, 0
        self._tokens, self._seconds = 0, 0.0
        self.forward.reset()
        self.backward.reset()

    def add(self, loss: float, tokens: int, solves: Iterable[Stats]) -> None:
        """One segment, after its backward pass."""
        self._loss += loss
        self.segments += 1
        self._tokens += tokens
        for stats in solves:
            self.forward(stats)
            for solve in stats.backward:
                self.backward(solve)

    def step(self, *, gradient_norm: float, clip: float, seconds: float) -> None:
        """One optimizer step: the norm of its gradient before it was clipped to `clip`, and the time it took."""
        self._norm += gradient_norm
        self._clipped += gradient_norm > clip
        self._steps += 1
        self._seconds += seconds

    def sums(self) -> Tensor:
        """(7 + 5 + 5,) float64: segments, steps, loss, gradient norm, clipped steps, tokens, tokens per second; then the
        sums of the forward solves and of the backward ones.

        The seconds of processes that work side by side must not add up, but their tokens per second do.
        """
        speed = self._tokens / self._seconds if self._seconds else 0.0
        own = (self.segments, self._steps, self._loss, self._norm, self._clipped, self._tokens, speed)
        return torch.tensor([*own, *self.forward.sums, *self.backward.sums], dtype=torch.float64)

    def row(self, sums: Tensor | None = None) -> dict[str, float]:
        """The means under the names they have in metrics.jsonl; of the `sums` of several windows, if given."""
        values: Sequence[float] = (self.sums() if sums is None else sums).tolist()
        segments, steps, loss, norm, clipped, _, speed = values[:7]
        row = {"train/loss": loss / segments}
        if steps:  # a stop may come before the first step is done
            row |= {"train/gradient_norm": norm / steps, "train/clipped": clipped / steps}
            row["train/tokens_per_second"] = speed
        solves = values[7:]
        for name, part in (("forward", solves[: len(FIELDS)]), ("backward", solves[len(FIELDS) :])):
            if means := solve_means(part):
                row |= {f"{name}/{key}": value for key, value in dataclasses.asdict(means).items()}
        return row

    def status(self) -> str:
        """The means of this process as the progress bar shows them."""
        row = self.row()
        parts = [f"loss {row['train/loss']:.3f}"]
        if "forward/evaluations" in row:
            backward = f"+{row['backward/evaluations']:.1f}" if "backward/evaluations" in row else ""
            parts.append(f"f evals {row['forward/evaluations']:.1f}{backward}")
            parts.append(f"residual {row['forward/residual']:.0e}")
        parts.append(f"{row['train/tokens_per_second']:,.0f} tokens/s")
        return "  ".join(parts)
