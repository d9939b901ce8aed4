"""What each way to differentiate costs, and how far its gradient is from the exact one.

The block of the DEQ-Transformer in float32, solved to a relative residual of 1e-4 by Anderson (Reversible: by its own
iteration, 40 evaluations at most). The gradient of <w, z*> in the injection is compared to that of a float64 solve to
1e-12. Time is that of solve and backward pass, interleaved, relative to Implicit's; memory is what is held between the two.

    python benchmarks/adjoints.py
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from harness import interleaved, save
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from equilibria import (
    Anderson,
    Implicit,
    Neumann,
    Phantom,
    Reversible,
    ReversiblePicard,
    Shine,
    Stats,
    Stopping,
    Unrolled,
    fixed_point,
)
from equilibria.models.block import TransformerBlock

BATCH, LENGTH, D_MODEL, ROUNDS = 8, 32, 64, 9
STOPPING = Stopping(rtol=1e-4, max_evals=80)
SAFE = Stopping(rtol=1e-4, max_evals=40)  # of the reversible solve: undoing more steps would outgrow float64
ADJOINTS: dict[str, tuple[Any, Any]] = {
    "Implicit()": (Anderson(), Implicit()),
    "Implicit(rtol=1e-2)": (Anderson(), Implicit(stopping=Stopping(rtol=1e-2))),
    "Implicit(max_evals=6)": (Anderson(), Implicit(stopping=Stopping(max_evals=6))),
    "Shine(refine=5)": (Anderson(), Shine(refine=5)),
    "Shine(refine=0)": (Anderson(), Shine(refine=0)),
    "Neumann(terms=5)": (Anderson(), Neumann(terms=5)),
    "Phantom(steps=5)": (Anderson(), Phantom(steps=5)),
    "Phantom() (Jacobian-free)": (Anderson(), Phantom()),
    "Unrolled()": (Anderson(), Unrolled()),
    "Unrolled(checkpoint=True)": (Anderson(), Unrolled(checkpoint=True)),
    "Reversible()": (ReversiblePicard(), Reversible()),
}


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    block = TransformerBlock(D_MODEL, 4, 4 * D_MODEL, init_std=0.03).double()
    injection = 2 * torch.randn(BATCH, LENGTH, 3 * D_MODEL, dtype=torch.float64)
    weight = torch.randn(BATCH, LENGTH, D_MODEL, dtype=torch.float64)
    tight = Stopping(rtol=1e-12, atol=0.0, max_evals=500)
    exact, stats = gradient(block, injection, weight, Anderson(), Implicit(stopping=tight), tight)
    assert stats.converged.all()
    assert stats.backward[0].converged.all()
    block, injection, weight = block.float(), injection.float(), weight.float()

    rows: dict[str, dict[str, Any]] = {}
    for name, (solver, adjoint) in ADJOINTS.items():
        found, stats = gradient(block, injection, weight, solver, adjoint, STOPPING)
        error = float((found.double() - exact).norm() / exact.norm())
        rows[name] = {
            "error": error,
            "forward_evaluations": stats.evaluations,
            "backward_products": stats.backward[0].evaluations if stats.backward else None,
            "held_mib": held(block, injection, solver, adjoint) / 2**20,
        }
        assert error < 1.0, f"{name}: the gradient does not even point the right way"
    runs: dict[str, Callable[[], object]] = {
        name: partial(gradient, block, injection, weight, solver, adjoint, STOPPING)
        for name, (solver, adjoint) in ADJOINTS.items()
    }
    seconds = interleaved(runs, ROUNDS)
    for name, row in rows.items():
        row["time"] = statistics.median(a / b for a, b in zip(seconds[name], seconds["Implicit()"], strict=True))
        print(f"{name:28s} error {row['error']:.1e}  time x{row['time']:.2f}  held {row['held_mib']:.1f} MiB")
    save("adjoints", {"block": {"batch": BATCH, "length": LENGTH, "d_model": D_MODEL}, "rounds": ROUNDS, "rows": rows})


def gradient(
    block: nn.Module, injection: Tensor, weight: Tensor, solver: Any, adjoint: Any, stopping: Stopping
) -> tuple[Tensor, Stats]:
    """d<w, z*>/d injection, and the statistics of the solve."""
    injection = injection.detach().requires_grad_()
    z, stats = solve(block, injection, solver, adjoint, stopping)
    (z * weight).sum().backward()
    assert injection.grad is not None
    return injection.grad, stats


def solve(block: Any, injection: Tensor, solver: Any, adjoint: Any, stopping: Stopping) -> tuple[Tensor, Stats]:
    if isinstance(adjoint, Reversible):
        stopping = SAFE
    z, stats = fixed_point(
        block, block.initial(injection), *block.prepare(injection), solver=solver, stopping=stopping, adjoint=adjoint
    )
    return z, stats


def held(block: nn.Module, injection: Tensor, solver: Any, adjoint: Any) -> int:
    """Bytes allocated by a solve and not freed when it is over."""
    injection = injection.detach().requires_grad_()
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        kept = solve(block, injection, solver, adjoint, STOPPING)
        gc.collect()
    del kept
    profiler = record.profiler
    assert profiler is not None
    assert profiler.kineto_results is not None
    events: list[Any] = profiler.kineto_results.events()
    return sum(event.nbytes() for event in events if event.name() == "[memory]")


if __name__ == "__main__":
    main()
