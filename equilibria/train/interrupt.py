"""Ctrl-C, or the SIGTERM of a job system, as a request to stop at the next good moment."""

from __future__ import annotations

import os
import signal
from types import FrameType, TracebackType
from typing import Any

from equilibria.train.distributed import Ranks


class Interrupted(Exception):
    """The user asked to stop, and everything worth keeping has been saved."""


class StopRequest:
    """While entered, the first SIGINT or SIGTERM sets `requested`; a SIGINT after it raises KeyboardInterrupt as usual.

    It says so on standard error unless `quiet`, as all processes of a job but one should be.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.requested, self.quiet = False, quiet
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
        if not self.quiet:
            # Not print: its buffer may be in use by the very code that the signal interrupted.
            os.write(2, b"\nstopping after this step; ctrl-C again aborts\n")


class StopTogether:
    """A request that any process of a job may have got, on which all of them act at the same moment."""

    every = 8
    """Processes ask each other at every so many checks, since that has them wait for the slowest."""

    def __init__(self, stop: StopRequest, ranks: Ranks) -> None:
        self.stop, self.ranks = stop, ranks
        self.agreed = False
        self._checks = 0

    def check(self, *, at_once: bool = False) -> None:
        """Raise Interrupted on all processes if a stop was requested of one; all must call it equally often."""
        if self.ranks.count > 1:
            self._checks += 1
            if at_once or self._checks % self.every == 0:
                self.agreed = self.ranks.any(self.stop.requested)
        self.check_agreed()

    def check_agreed(self) -> None:
        """The same without asking again: `agreed` is what the processes know of each other already."""
        if self.ranks.count == 1:
            self.stop.check()
        elif self.agreed:
            raise Interrupted
