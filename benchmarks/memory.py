"""Is training memory flat in the solver's budget?

One training step of the DEQ-Transformer block in a process of its own for every solver and budget, with tolerance zero so
that the whole budget is spent. The figure is the peak of the bytes that tensors hold during the step, from the profiler's
record of every allocation. Unrolled differentiation is measured beside it: it is what flat memory is compared with.

    python benchmarks/memory.py
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from harness import save
from torch.profiler import ProfilerActivity, profile

from equilibria import Anderson, Broyden, Implicit, Picard, Stopping, Unrolled, fixed_point
from equilibria.models.block import TransformerBlock

BATCH, LENGTH, WIDTH = 16, 128, 256
BUDGETS = (8, 16, 32, 64)
SOLVERS = {
    "picard": (Picard(), "implicit"),
    "anderson, history 5": (Anderson(history=5), "implicit"),
    "broyden, history 5": (Broyden(history=5), "implicit"),
    "unrolled picard": (Picard(), "unrolled"),
}


def step(solver: str, budget: int) -> float:
    """Peak memory (MiB) of one solve and its backward pass, in this process."""
    torch.manual_seed(0)
    torch.set_num_threads(2)
    block = TransformerBlock(WIDTH, 4, 4 * WIDTH)
    injection = torch.randn(BATCH, LENGTH, 3 * WIDTH)
    method, kind = SOLVERS[solver]
    stopping = Stopping(rtol=0.0, atol=0.0, max_evals=budget)
    adjoint = Unrolled() if kind == "unrolled" else Implicit(stopping=Stopping(rtol=1e-4, max_evals=16))
    with torch.no_grad():  # so that libraries have loaded what they load on first use
        block(block.initial(injection), *block.prepare(injection))

    def train() -> None:
        args = block.prepare(injection)
        z0 = block.initial(injection)
        z, stats = fixed_point(block, z0, *args, solver=method, stopping=stopping, adjoint=adjoint)
        z.square().mean().backward()
        if stats.evaluations != budget:
            raise RuntimeError(f"{stats.evaluations} evaluations instead of {budget}")

    return peak(train)


def peak(run: Callable[[], object]) -> float:
    """The most memory (MiB) that tensors hold at once during a run, besides what they held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    profiler = record.profiler
    assert profiler is not None
    assert profiler.kineto_results is not None
    events: list[Any] = profiler.kineto_results.events()
    changes = [event.nbytes() for event in events if event.name() == "[memory]"]
    return max(accumulate(changes)) / 2**20


def main() -> None:
    if len(sys.argv) == 3:
        print(json.dumps(step(sys.argv[1], int(sys.argv[2]))))
        return
    rows = {}
    for solver in SOLVERS:
        peaks = {}
        for budget in BUDGETS:
            command = [sys.executable, __file__, solver, str(budget)]
            peaks[budget] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        spread = max(peaks.values()) / min(peaks.values()) - 1
        rows[solver] = {"peak_mib": {str(budget): peak for budget, peak in peaks.items()}, "spread": spread}
        print(f"{solver:22} " + "  ".join(f"{b}: {p:6.1f} MiB" for b, p in peaks.items()) + f"  spread {spread:.2%}")
    save("memory", {"block": {"batch": BATCH, "length": LENGTH, "d_model": WIDTH}, "rows": rows})


if __name__ == "__main__":
    main()
