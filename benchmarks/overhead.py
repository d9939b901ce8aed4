"""How much of a solve is not f?

Overhead = wall time of a solve / (evaluations x wall time of one f), for the block of the DEQ-Transformer, forward and
without gradients. One f is timed as a chain z <- f(z), as long as the solve's, so that both move through fresh memory
alike; chain and solve take turns. The solve's residual is recomputed before anything is timed. As in `equilibria train`,
the C library keeps freed memory; `--return-memory` measures, without recording it, what page faults cost otherwise.

    python benchmarks/overhead.py [--return-memory]
"""

from __future__ import annotations

import statistics
import sys

import torch
from harness import interleaved, median_ratio, save

from equilibria import Anderson, Broyden, Picard, Solution, Stopping, fixed_point
from equilibria.models.block import Memory, TransformerBlock
from equilibria.train.memory import keep_freed_memory

SIZES = (
    {"d_model": 128, "length": 64, "memory": 64, "batch": 16},
    {"d_model": 256, "length": 64, "memory": 64, "batch": 16},
    {"d_model": 512, "length": 64, "memory": 150, "batch": 8},
)
SOLVERS = {"picard": Picard(), "anderson": Anderson(), "broyden": Broyden()}
EVALUATIONS, ROUNDS = 16, 9


@torch.no_grad()
def measure(d_model: int, length: int, memory: int, batch: int) -> dict[str, dict[str, float]]:
    torch.manual_seed(0)
    block = TransformerBlock(d_model, 4, 4 * d_model)
    past = Memory(torch.randn(batch, memory, d_model), torch.randn(batch, memory, 3 * d_model))
    injection = torch.randn(batch, length, 3 * d_model)
    args, z0 = block.prepare(injection, past), block.initial(injection)
    stopping = Stopping(rtol=0.0, atol=0.0, max_evals=EVALUATIONS)  # every solve takes the same number of evaluations

    def chain() -> torch.Tensor:
        z = z0
        for _ in range(EVALUATIONS):
            z = block(z, *args)
        return z

    rows = {}
    for name, solver in SOLVERS.items():

        def solve(solver=solver) -> Solution:
            return fixed_point(block, z0, *args, solver=solver, stopping=stopping)

        z, stats = solve()
        residual = (block(z, *args) - z).flatten(1).square().mean(1).sqrt()
        torch.testing.assert_close(residual, stats.residual, rtol=1e-2, atol=1e-6)
        assert stats.evaluations == EVALUATIONS
        seconds = interleaved({"solve": solve, "chain": chain}, ROUNDS)
        rows[name] = {
            "overhead": median_ratio(seconds["solve"], seconds["chain"]),
            "ms_per_f": 1e3 * statistics.median(seconds["chain"]) / EVALUATIONS,
            "relative_residual": float(stats.relative.max()),
        }
    return rows


def main() -> None:
    torch.set_num_threads(2)
    keep = "--return-memory" not in sys.argv
    if keep:
        keep_freed_memory()
    results = []
    for size in SIZES:
        rows = measure(**size)
        results.append({**size, "solvers": rows})
        for name, row in rows.items():
            print(f"{size}  {name:9} overhead {row['overhead']:.3f}  one f {row['ms_per_f']:.2f} ms")
    if not keep:
        return
    save("overhead", {"evaluations": EVALUATIONS, "rounds": ROUNDS, "rows": results})


if __name__ == "__main__":
    main()
