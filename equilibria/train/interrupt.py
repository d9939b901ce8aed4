"""Ctrl-C, or the SIGTERM of a job system, as a request to stop at the next good moment."""

from __future__ import annotations

import os
import signal
from types import FrameType, TracebackType
from typing import Any


class Interrupted(Exception):
    """The user asked to stop, and everything worth keeping has been saved."""


class StopRequest:
    """While entered, the first SIGINT or SIGTERM sets `requested`; a SIGINT after it raises KeyboardInterrupt as usual."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        self._previous = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Raise Interrupted if a stop was requested."""
        if self.requested:
            raise Interrupted

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return  # a job system may ask more than once
        self.requested = True
        # Not print: its buffer may be in use by the very code that the signal interrupted.
        os.write(2, b"\nstopping after this step; ctrl-C again aborts\n")
