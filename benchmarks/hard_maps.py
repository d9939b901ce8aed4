"""How many evaluations until the median and until the last sample is solved, on maps that plain iteration does not solve.

Each solver with its default settings (Broyden with a history of 20), float32, residuals relative to ‖f(z)‖, measured once
more by a separate evaluation of f at the z returned.

    python benchmarks/hard_maps.py
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from harness import save
from torch import Tensor, nn

from equilibria import Anderson, Broyden, NewtonKrylov, Picard, Stopping, fixed_point
from equilibria.models.block import TransformerBlock

SOLVERS: dict[str, Any] = {
    "Anderson()": Anderson(),
    "Broyden(history=20)": Broyden(history=20),
    "NewtonKrylov()": NewtonKrylov(),
    "Picard()": Picard(),
}
TOLERANCES = (1e-3, 1e-6)
BUDGET = 300
Map = Callable[[Tensor], Tensor]


def tanh(size: int, batch: int, *, scale: float, orthogonal: bool) -> tuple[Map, Tensor]:
    """z = tanh(W z + x), W orthogonal times `scale` or random with that spectral norm."""
    W, x = torch.randn(size, size), torch.randn(batch, size)
    W = torch.linalg.qr(W)[0] * scale if orthogonal else W * (scale / torch.linalg.matrix_norm(W, 2))
    return lambda z: torch.tanh(z @ W + x), torch.zeros(batch, size)


def block(std: float | None) -> tuple[Map, Tensor]:
    """A post-norm Transformer block, weights N(0, std²) or as nn.Linear draws them, injection N(0, 1)."""
    made = TransformerBlock(128, 4, 512, init_std=std or 0.02)
    if std is None:
        for layer in made.modules():
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()
    injection = torch.randn(16, 64, 3 * 128)
    args = made.prepare(injection)
    return lambda z: made(z, *args), made.initial(injection)


MAPS: dict[str, Callable[[], tuple[Map, Tensor]]] = {
    "tanh, random W of norm 0.9, d 64": lambda: tanh(64, 32, scale=0.9, orthogonal=False),
    "tanh, orthogonal W times 1.2, d 64": lambda: tanh(64, 32, scale=1.2, orthogonal=True),
    "tanh, orthogonal W times 1.2, d 1024": lambda: tanh(1024, 32, scale=1.2, orthogonal=True),
    "block, weights as nn.Linear draws them": lambda: block(None),
    "block, weights N(0, 0.02²)": lambda: block(0.02),
    "block, weights N(0, 0.05²)": lambda: block(0.05),
}


def reached(f: Map, z0: Tensor, solver: Any, rtol: float) -> dict[str, int | None]:
    """Evaluations until half and until all of the samples have a relative residual of rtol; None where that never was."""
    stopping = Stopping(rtol=rtol, atol=0.0, max_evals=BUDGET)
    found: dict[str, int | None] = {}
    z, stats = fixed_point(f, z0, solver=solver, stopping=stopping, raise_nonfinite=False)
    g = (f(z) - z).flatten(1).norm(dim=1)
    truly = g <= 1.01 * rtol * f(z).flatten(1).norm(dim=1)
    assert bool((truly | ~stats.converged).all()), "a sample is reported as solved that is not"
    found["all"] = stats.evaluations if bool(stats.converged.all()) else None
    # A solve to half of the samples: evaluations in proportion to steps, exact where a step is one evaluation.
    steps = stats.steps.where(stats.converged, BUDGET + 1).sort().values
    median = int(steps[(len(steps) - 1) // 2])
    share = (stats.evaluations - 1) / max(1, int(stats.steps.max()))
    found["half"] = None if median > BUDGET else round(1 + median * share)
    return found


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(1)
    rows: dict[str, Any] = {}
    for name, make in MAPS.items():
        torch.manual_seed(0)
        f, z0 = make()
        rows[name] = {
            key: {f"{rtol:.0e}": reached(f, z0, solver, rtol) for rtol in TOLERANCES} for key, solver in SOLVERS.items()
        }
        print(name, *(f"\n    {solver:20s} {result}" for solver, result in rows[name].items()), flush=True)
    save("hard_maps", {"budget": BUDGET, "rows": rows})


if __name__ == "__main__":
    main()
