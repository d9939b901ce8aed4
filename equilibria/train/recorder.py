"""Rows of metrics: to metrics.jsonl, to the trackers, and past the rules that give advice."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from equilibria.solution import Stats
from equilibria.train.advice import Advice
from equilibria.train.adviser import Adviser
from equilibria.train.config import RunConfig, to_json
from equilibria.train.distributed import ALONE, Ranks
from equilibria.train.run_folder import MetricsLog, RunFolder, read_metrics
from equilibria.train.state import TrainState
from equilibria.train.traces import trace_row
from equilibria.train.trackers import Trackers
from equilibria.train.window import Window


class Recorder:
    """Writes what the window of latest steps saw, and whatever else is given, under the present step.

    While not open it drops what it is given.
    """

    def __init__(self, folder: RunFolder, config: RunConfig, state: TrainState, ranks: Ranks = ALONE) -> None:
        self.folder, self.config, self.state, self.ranks = folder, config, state, ranks
        self.window = Window()
        self.say: Callable[[str], None] = lambda text: None
        self._trackers = Trackers(config.trackers, folder, project=config.tracker_project, say=lambda text: self.say(text))
        self._adviser = Adviser(config)
        self._log: MetricsLog | None = None
        self._traces: MetricsLog | None = None

    def open(self, say: Callable[[str], None]) -> None:
        """Continue the files and the trackers, without the rows after the present step; `say` prints a line."""
        self.say = say
        if not self.ranks.is_main:
            return
        self._log = MetricsLog(self.folder.metrics, step=self.state.step)
        self._traces = MetricsLog(self.folder.traces, step=self.state.step)
        for row in read_metrics(self.folder.metrics):  # what was said before is not said again
            self._adviser.see(row)
        if self.state.step == 0:
            self._advise(self._adviser.start())
        self._trackers.open(step=self.state.step, config=to_json(self.config))

    def sync(self) -> None:
        """Force the rows to the disk: a checkpoint must not be newer than they are."""
        if self._log is not None:
            self._log.sync()

    def close(self) -> None:
        """Close the files and end the trackers."""
        for log in (self._log, self._traces):
            if log is not None:  # ctrl-C may have struck before
                log.close()
        if self._traces is not None:
            self._trackers.close()
        self._log = self._traces = None

    def record_window(self, rate: float) -> None:
        """Write the row of the steps since the last one, of all processes; `rate` is the learning rate of the next."""
        if self.window.segments:
            totals = {"train/tokens": self.state.tokens, "train/memory_bytes": self.state.peak_memory}
            self.record({**self.window.row(self.ranks.sum(self.window.sums())), "train/learning_rate": rate, **totals})
            self.window.clear()

    def record(self, row: dict[str, Any]) -> None:
        """Write a row, without values that are no numbers."""
        row = {key: value for key, value in row.items() if value is not None and math.isfinite(value)}
        if self._log is not None:
            stamped = {"step": self.state.step, "seconds": round(self.state.seconds, 3), **row}
            self._log.append(stamped)
            self._trackers.log(row, self.state.step)
            self._advise(self._adviser.see(stamped))

    def record_trace(self, stats: Stats) -> None:
        """Write a traced solve."""
        if self._traces is not None:
            self._traces.append({"step": self.state.step, "method": self.config.solver.method, **trace_row(stats)})

    def _advise(self, found: list[Advice]) -> None:
        for advice in found:
            self.say(f"step {advice.step}  advice: {advice}")
