"""Rows of metrics: to metrics.jsonl and to TensorBoard."""

from __future__ import annotations

import math
from typing import Any

from accelerate import Accelerator

from equilibria.train.run_folder import MetricsLog, RunFolder
from equilibria.train.state import TrainState
from equilibria.train.window import Window


class Recorder:
    """Writes what the window of latest steps saw, and whatever else is given, under the present step.

    While not open it drops what it is given.
    """

    def __init__(self, folder: RunFolder, accelerator: Accelerator, state: TrainState) -> None:
        self.folder, self.accelerator, self.state = folder, accelerator, state
        self.window = Window()
        self._log: MetricsLog | None = None
        self._tracking = False

    def open(self) -> None:
        """Continue the files, without the rows after the present step."""
        self._log = MetricsLog(self.folder.metrics, step=self.state.step)
        purge = {"purge_step": self.state.step + 1} if self.state.step else {}
        self.accelerator.init_trackers("tensorboard", init_kwargs={"tensorboard": purge})
        self._tracking = True

    def close(self) -> None:
        """Close the files."""
        if self._log is not None:
            self._log.close()
            self._log = None
        if self._tracking:  # ctrl-C may have struck before
            self._tracking = False
            self.accelerator.end_training()

    def record_window(self, rate: float) -> None:
        """Write the row of the steps since the last one; `rate` is the learning rate of the next."""
        if self.window.segments:
            totals = {"train/tokens": self.state.tokens, "train/memory_bytes": self.state.peak_memory}
            self.record({**self.window.row(), "train/learning_rate": rate, **totals})
            self.window.clear()

    def record(self, row: dict[str, Any]) -> None:
        """Write a row, without values that are no numbers."""
        row = {key: value for key, value in row.items() if value is not None and math.isfinite(value)}
        if self._log is not None:
            self._log.append({"step": self.state.step, "seconds": round(self.state.seconds, 3), **row})
            self.accelerator.log(row, step=self.state.step)
