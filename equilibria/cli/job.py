"""A command that several processes run together, and what they say when one of them fails."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator

import torch.distributed as dist

from equilibria.cli.errors import describe
from equilibria.train.distributed import Ranks, join_job, lost_another


@contextlib.contextmanager
def job() -> Iterator[Ranks]:
    """The processes that a launcher has started, or this one alone.

    An error that all of them have is reported once, one that some have with the number of each process. Either way the
    process ends at once, since others may be waiting for it: the launcher then ends those.
    """
    ranks = join_job()
    try:
        yield ranks
    except BaseException as error:
        if ranks.count == 1 or not dist.is_initialized():
            raise
        code = _report(error, ranks)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # the usual way out waits for what the other processes never send
    ranks.close()


def _report(error: BaseException, ranks: Ranks) -> int:
    """Print what there is to say, and return the exit code."""
    if lost_another(error):
        message, code = "another process of the job is gone", 1
    elif (found := describe(error)) is not None:
        message, code = found
    else:
        message, code = "".join(traceback.format_exception(error)), 1
    try:
        blamed = ranks.blame(message)
    except (dist.DistError, RuntimeError):  # the process that keeps the messages is gone too
        blamed = {ranks.rank: message}
    same = len(blamed) == ranks.count and len(set(blamed.values())) == 1
    silent = not ranks.is_main if same else lost_another(error) and len(set(blamed.values())) > 1
    if not silent:
        where = "" if same else f"process {ranks.rank}: "
        text = message if "\n" in message else " ".join(message.split())
        print(f"equilibria: {where}{text}", file=sys.stderr, flush=True)
    return code
