"""Means over the steps between two rows of metrics."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from equilibria.solution import Stats
from equilibria.train.solves import SolveMeter


class Window:
    """Loss, speed and solves of the latest steps."""

    def __init__(self) -> None:
        self.forward, self.backward = SolveMeter(), SolveMeter()
        self.clear()

    def clear(self) -> None:
        """Start anew."""
        self.losses: list[float] = []
        self.tokens, self.seconds = 0, 0.0
        self.forward.reset()
        self.backward.reset()

    def add(self, loss: float, tokens: int, solves: Iterable[Stats]) -> None:
        """One segment, after its backward pass; add its time to `seconds` too."""
        self.losses.append(loss)
        self.tokens += tokens
        for stats in solves:
            self.forward(stats)
            for solve in stats.backward:
                self.backward(solve)

    def row(self) -> dict[str, float]:
        """The means, under the names they have in metrics.jsonl."""
        row = {"train/loss": self._loss(), "train/tokens_per_second": self.tokens / self.seconds}
        for name, meter in (("forward", self.forward), ("backward", self.backward)):
            if means := meter.means():
                row |= {f"{name}/{key}": value for key, value in dataclasses.asdict(means).items()}
        return row

    def status(self) -> str:
        """The means as the progress bar shows them."""
        parts = [f"loss {self._loss():.3f}"]
        forward, backward = self.forward.means(), self.backward.means()
        if forward:
            both = f"f evals {forward.evaluations:.1f}" + (f"+{backward.evaluations:.1f}" if backward else "")
            parts += [both, f"residual {forward.residual:.0e}"]
        parts.append(f"{self.tokens / self.seconds:,.0f} tokens/s")
        return "  ".join(parts)

    def _loss(self) -> float:
        return sum(self.losses) / len(self.losses)
