"""How time and memory grow: with batch, length, d_model and budget of a training step, and with a solver's history.

    python benchmarks/growth.py

Each row is a power law fitted by least squares on log-log: its exponent, and R², the share of the variance that it
explains. A training step is one solve of a Transformer block, with as many evaluations as the budget says, and its backward
pass with eight. What history costs is the time of one step of a solver whose history is full, less that of f.
"""

from __future__ import annotations

import gc
import math
import statistics
from collections.abc import Callable
from typing import Any

import torch
from harness import interleaved, save
from memory import peak
from torch import Tensor

from equilibria import Anderson, Broyden, Implicit, Picard, Stopping, fixed_point
from equilibria.iterate import BudgetedMap
from equilibria.models.block import TransformerBlock
from equilibria.solvers import Solver
from equilibria.train.memory import keep_freed_memory

USUAL = {"batch": 8, "length": 64, "d_model": 128, "budget": 8}
AXES = {
    "batch": (4, 8, 16, 32, 64),
    "length": (32, 64, 128, 256, 512),
    "d_model": (64, 128, 256, 512),
    "budget": (8, 16, 32, 64),
}
BACKWARD, ROUNDS = 8, 5
HISTORIES = (5, 10, 20, 40, 80)
HISTORY_STATE = (16, 8192)
SOLVERS: dict[str, Callable[[int], Solver[Any]]] = {
    "anderson": lambda m: Anderson(history=m, type=2, restart=None),  # nothing that depends on how the solve goes
    "broyden": lambda m: Broyden(history=m),
}


def training_step(batch: int, length: int, d_model: int, budget: int) -> Callable[[], None]:
    torch.manual_seed(0)
    block = TransformerBlock(d_model, 4, 4 * d_model)
    injection = torch.randn(batch, length, 3 * d_model)
    stopping = Stopping(rtol=0.0, atol=0.0, max_evals=budget)
    adjoint = Implicit(solver=Picard(), stopping=Stopping(rtol=0.0, atol=0.0, max_evals=BACKWARD))

    def step() -> None:
        block.zero_grad()
        args = block.prepare(injection)
        z, stats = fixed_point(block, block.initial(injection), *args, solver=Broyden(history=5), stopping=stopping,
                               adjoint=adjoint)  # fmt: skip
        z.square().mean().backward()
        assert (stats.evaluations, stats.backward[0].evaluations) == (budget, BACKWARD), stats

    return step


def axis(name: str) -> dict[str, Any]:
    steps = {str(size): training_step(**(USUAL | {name: size})) for size in AXES[name]}
    seconds = interleaved(steps, ROUNDS)
    memory = []
    for step in steps.values():
        gc.collect()
        memory.append(peak(step))
    times = [1e3 * statistics.median(seconds[size]) for size in steps]
    return {
        "sizes": AXES[name],
        "ms": times,
        "mib": memory,
        "time": power(AXES[name], times),
        "memory": power(AXES[name], memory),
    }


def one_step(solver: Solver[Any], history: int) -> tuple[Callable[[], object], Callable[[], object]]:
    """A step of the solver with its history full, and f alone."""
    torch.manual_seed(0)
    b = torch.randn(HISTORY_STATE)

    def f(z: Tensor) -> Tensor:
        return torch.tanh(z.roll(1, dims=1)) + b

    counted = BudgetedMap(f, (), 10**9)
    state = solver.init(counted, torch.zeros(HISTORY_STATE))
    for _ in range(history + 1):
        state = solver.step(counted, state)
    held = [state]

    def step() -> None:
        held[0] = solver.step(counted, held[0])

    return step, lambda: f(held[0].z)


@torch.no_grad()
def history(name: str) -> dict[str, Any]:
    runs = {}
    for m in HISTORIES:
        runs[f"{m}"], runs[f"f {m}"] = one_step(SOLVERS[name](m), m)
    seconds = interleaved(runs, 4 * ROUNDS)
    times = [1e3 * (statistics.median(seconds[f"{m}"]) - statistics.median(seconds[f"f {m}"])) for m in HISTORIES]
    return {"sizes": HISTORIES, "ms": times, "time": power(HISTORIES, times)}


def power(sizes: tuple[int, ...], values: list[float]) -> dict[str, float]:
    """The exponent of values = c · size^exponent, fitted to the logarithms, and its R², which says little of a constant."""
    x, y = (torch.tensor([math.log(v) for v in each], dtype=torch.float64) for each in (sizes, values))
    x, y = x - x.mean(), y - y.mean()
    slope = float(x @ y / (x @ x))
    return {"exponent": slope, "r2": float(1 - (y - slope * x).square().sum() / y.square().sum().clamp_min(1e-300))}


def main() -> None:
    torch.set_num_threads(1)
    keep_freed_memory()
    rows = {}
    for name in AXES:
        rows[name] = axis(name)
        print(f"{name:20}", rows[name], flush=True)
    for name in SOLVERS:
        rows[f"history, {name}"] = history(name)
        print(f"history, {name:10}", rows[f"history, {name}"], flush=True)
    save("growth", {"usual": USUAL, "backward": BACKWARD, "history_state": HISTORY_STATE, "rows": rows})


if __name__ == "__main__":
    main()
