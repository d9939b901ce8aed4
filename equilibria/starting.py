"""Ctrl-C while the command `equilibria` is still loading PyTorch and its own files, which takes a second or two.

There is nothing to save yet, so it ends at once with one line and exit code 130 instead of a traceback out of some import.
The package imports this file before all others; where the package is used as a library it does nothing.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType


def is_the_command() -> bool:
    """Whether this process is `equilibria ...` or `python -m equilibria ...`."""
    if sys.argv[:1] == ["-m"]:  # what Python puts there while it looks for the module to run
        return "equilibria" in sys.orig_argv
    return bool(sys.argv) and os.path.splitext(os.path.basename(sys.argv[0]))[0] == "equilibria"


def started() -> None:
    """From now on ctrl-C raises KeyboardInterrupt as usual."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(number: int, frame: FrameType | None) -> None:
    os.write(2, b"equilibria: aborted\n")
    os._exit(130)


# Not where the parent has it ignored, as of a command in the background.
if is_the_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _end)
