"""Progress of a run on standard error: a bar in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

LINE_EVERY = 30.0  # seconds between lines where there is no terminal


class Progress:
    """Shows the step, a few values, the speed and the time left.

    A bar redraws itself in place. In a log file that would be one long line of rubbish, so there a plain line is
    written twice a minute instead. Of several processes one shows it.
    """

    def __init__(
        self, label: str, *, steps: int, done: int = 0, line_every: float = LINE_EVERY, shown: bool = True
    ) -> None:
        self._label, self._steps, self._done = label, steps, done
        self._first, self._started = done, time.monotonic()
        self._line_every, self._last_line = line_every, time.monotonic()
        self._shown, self._bar = shown, None
        if shown and sys.stderr.isatty():
            layout = "{desc} {percentage:3.0f}%|{bar:12}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}"
            self._bar = tqdm(desc=label, total=steps, initial=done, bar_format=layout, dynamic_ncols=True, file=sys.stderr)

    def step(self, values: str) -> None:
        """One more step is done; `values` is what to show beside it."""
        self._done += 1
        if self._bar is not None:
            self._bar.set_postfix_str(values, refresh=False)
            self._bar.update()
        elif time.monotonic() - self._last_line >= self._line_every:
            self._last_line = time.monotonic()
            per_step = (self._last_line - self._started) / (self._done - self._first)
            left = tqdm.format_interval(int(per_step * (self._steps - self._done)))
            self.note(f"step {self._done}/{self._steps}  {values}  {left} left")

    def back_to(self, step: int) -> None:
        """Fewer steps are done than was thought."""
        self._done = self._first = step
        self._started = time.monotonic()
        if self._bar is not None:
            self._bar.n = step
            self._bar.refresh()

    def note(self, text: str) -> None:
        """Print a line that stays."""
        line = f"{self._label}  {text}"
        if not self._shown:
            return
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the bar where it is and go to the next line."""
        if self._bar is not None:
            self._bar.close()
