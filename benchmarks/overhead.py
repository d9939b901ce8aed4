"""How much of a solve is not f?

Overhead = wall time of a solve / (evaluations x wall time of one f), for the block of the DEQ-Transformer and for
z = tanh(W z + x), d = 1024, forward and without gradients; that of a solve compiled as one graph is over a compiled f.
Bookkeeping is the difference, per evaluation. One f is timed as a chain z <- f(z), as long as the solve's, so that both
move through fresh memory alike; the two take turns. The solve's residual is recomputed before anything is timed. As in
`equilibria train`, the C library keeps freed memory; `--return-memory` measures, without recording it, what page faults
cost otherwise.

    python benchmarks/overhead.py [--return-memory]
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
from harness import interleaved, median_ratio, save

from equilibria import Anderson, Broyden, Picard, Solution, Stopping, fixed_point
from equilibria.models.block import Memory, TransformerBlock
from equilibria.nn.affine import affine
from equilibria.solvers import Solver
from equilibria.train.memory import keep_freed_memory

SIZES = (
    {"d_model": 128, "length": 64, "memory": 64, "batch": 16},
    {"d_model": 256, "length": 64, "memory": 64, "batch": 16},
    {"d_model": 512, "length": 64, "memory": 150, "batch": 8},
)
MAPS = ({"d": 1024, "batch": 32},)
"""z = tanh(W z + x), orthogonal W times 1.2, so that no solver is done early."""
SOLVERS: dict[str, tuple[Solver[Any], bool]] = {
    "Picard()": (Picard(), False),
    "Anderson()": (Anderson(), False),
    "Broyden()": (Broyden(), False),
    "Anderson(type=2, history=5), one graph": (Anderson(type=2, history=5), True),
}
"""Name -> (solver, whether the solve is compiled as one graph and compared with a compiled f)."""
COMPILED: dict[str, str | int | bool | Callable[..., Any]] = {"cpp_wrapper": True}
EVALUATIONS, ROUNDS = 16, 9


@torch.no_grad()
def of_block(d_model: int, length: int, memory: int, batch: int) -> dict[str, dict[str, float]]:
    torch.manual_seed(0)
    block = TransformerBlock(d_model, 4, 4 * d_model)
    past = Memory(torch.randn(batch, memory, d_model), torch.randn(batch, memory, 3 * d_model))
    injection = torch.randn(batch, length, 3 * d_model)
    return measure(block, block.initial(injection), block.prepare(injection, past))


@torch.no_grad()
def of_map(d: int, batch: int) -> dict[str, dict[str, float]]:
    torch.manual_seed(0)
    W, x = 1.2 * torch.linalg.qr(torch.randn(d, d))[0], torch.randn(batch, d)
    return measure(lambda z, W, x: torch.tanh(affine(z, W, x)), torch.zeros_like(x), (W, x))


def measure(f: Callable[..., torch.Tensor], z0: torch.Tensor, args: tuple[Any, ...]) -> dict[str, dict[str, float]]:
    """Solver -> overhead, and what it rests on."""
    stopping = Stopping(rtol=0.0, atol=0.0, max_evals=EVALUATIONS)  # every solve takes the same number of evaluations
    compiled = torch.compile(lambda z, *args: f(z, *args), dynamic=False, options=COMPILED)
    rows = {}
    for name, (solver, one_graph) in SOLVERS.items():

        def chain(f: Callable[..., torch.Tensor] = compiled if one_graph else f) -> torch.Tensor:
            z = z0
            for _ in range(EVALUATIONS):
                z = f(z, *args)
            return z

        def whole(z0: torch.Tensor, *args: Any, solver: Solver[Any] = solver) -> Solution:
            return fixed_point(f, z0, *args, solver=solver, stopping=stopping)

        made = torch.compile(whole, fullgraph=True, dynamic=False, options=COMPILED) if one_graph else whole

        def solve(made: Callable[..., Solution] = made) -> Solution:
            return made(z0, *args)

        z, stats = solve()
        residual = (f(z, *args) - z).flatten(1).square().mean(1).sqrt()
        torch.testing.assert_close(residual, stats.residual, rtol=1e-2, atol=1e-6)
        assert stats.evaluations == EVALUATIONS
        seconds = interleaved({"solve": solve, "chain": chain}, ROUNDS)
        added = [(s - c) / EVALUATIONS for s, c in zip(seconds["solve"], seconds["chain"], strict=True)]
        rows[name] = {
            "overhead": median_ratio(seconds["solve"], seconds["chain"]),
            "ms_per_f": 1e3 * statistics.median(seconds["chain"]) / EVALUATIONS,
            "ms_added_per_step": 1e3 * statistics.median(added),
            "relative_residual": float(stats.relative.max()),
        }
    return rows


def show(what: dict[str, int], rows: dict[str, dict[str, float]]) -> None:
    for name, row in rows.items():
        print(
            f"{what}  {name:38} overhead {row['overhead']:.3f}  one f {row['ms_per_f']:.3f} ms  "
            f"bookkeeping {row['ms_added_per_step']:.3f} ms per step"
        )


def main() -> None:
    torch.set_num_threads(2)
    keep = "--return-memory" not in sys.argv
    if keep:
        keep_freed_memory()
    blocks = [{**size, "solvers": of_block(**size)} for size in SIZES]
    maps = [{**size, "solvers": of_map(**size)} for size in MAPS]
    for row in (*blocks, *maps):
        show({key: value for key, value in row.items() if key != "solvers"}, row["solvers"])
    if keep:
        save("overhead", {"evaluations": EVALUATIONS, "rounds": ROUNDS, "rows": blocks, "maps": maps})


if __name__ == "__main__":
    main()
