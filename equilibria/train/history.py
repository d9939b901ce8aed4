"""The rows of a run as they come, in a space that does not grow with the run."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from equilibria.train.config import RunConfig

Row = Mapping[str, Any]
MOST = 512
"""Rows of the whole run that are kept, evenly spread."""


class History:
    """The latest rows, some of all, and the validations; without the warm-up on an explicit stack, which differs."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.step = 0
        self.valid: list[Row] = []
        self.seconds_inside, self.seconds_outside = 0.0, 0.0
        self._recent: deque[Row] = deque(maxlen=24)
        self._all: list[Row] = []
        self._every, self._seen, self._tokens = 1, 0, 0

    def add(self, row: Row) -> None:
        """The next row of metrics."""
        self.step = row["step"]
        if "valid/loss" in row:
            if self.step > self.config.optim.pretrain_steps:
                self.valid.append(row)
        elif "train/loss" in row:
            self._add_time(row)
            warm_up = self.config.optim.pretrain_steps
            # The row in which the stack gives way to the equilibrium holds steps of both.
            if not warm_up or self.step >= warm_up + self.config.log_every:
                self._add_row(row)

    def last(self, count: int, key: str) -> list[Row]:
        """The latest rows of training that have a value of this name, at most so many."""
        return [row for row in self._recent if key in row][-count:]

    def rows(self, key: str) -> list[Row]:
        """Rows of the whole run that have a value of this name."""
        return [row for row in self._all if key in row]

    def loss_until(self, step: int) -> float | None:
        """Mean training loss of the last rows up to a step."""
        until = [row for row in self._all if row["step"] <= step][-5:]
        return mean(until, "train/loss") if until else None

    def _add_row(self, row: Row) -> None:
        self._recent.append(row)
        if self._seen % self._every == 0:
            self._all.append(row)
        self._seen += 1
        if len(self._all) == MOST:
            self._all, self._every = self._all[::2], 2 * self._every

    def _add_time(self, row: Row) -> None:
        speed, tokens = row.get("train/tokens_per_second"), row.get("train/tokens")
        if speed and tokens is not None:
            self.seconds_inside += (tokens - self._tokens) / speed
            self._tokens = tokens
        self.seconds_outside = max(0.0, row.get("seconds", 0.0) - self.seconds_inside)


def mean(rows: Sequence[Row], key: str) -> float:
    """Mean of the values of this name."""
    values = [row[key] for row in rows if key in row]
    return sum(values) / len(values)
