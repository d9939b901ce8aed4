"""Memory of this process: its peak, and how the C library handles what is freed."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from pathlib import Path

import psutil
import torch


class PeakMemory:
    """The most memory in use since the object was made: of the GPU if there is one, else of the process, in bytes.

    >>> peak = PeakMemory(torch.device("cpu")); grown = torch.ones(10); peak.read() > 0
    True
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        gc.collect()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            _reset_resident_peak()

    def read(self) -> int:
        """Bytes at the peak so far."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return _resident_peak()


def keep_freed_memory() -> None:
    """Let glibc keep what tensors free, for the tensors that follow.

    By default it returns every block above 128 KiB to the kernel, and the next evaluation of f pays for fresh pages: about
    a third of its time at the size of the recipes. Does nothing with another C library.
    """
    trim_threshold, mmap_threshold, most = -1, -3, 2**31 - 1  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of mallopt(3)
    with contextlib.suppress(AttributeError, OSError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_threshold, most)
        libc.mallopt(trim_threshold, most)


def _reset_resident_peak() -> None:
    """Linux can start the high-water mark anew; elsewhere it spans the life of the process."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library than glibc, or Windows
        ctypes.CDLL(None).malloc_trim(0)  # else what earlier work freed, but glibc kept, would count again
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _resident_peak() -> int:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    info = psutil.Process().memory_info()
    if psutil.WINDOWS:
        return getattr(info, "peak_wset")  # noqa: B009 - the stubs know Linux alone
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if psutil.MACOS else peak * 1024
