"""What the manual's page on choosing rests on: solvers and adjoints on problems from easy to hard.

For each problem, the spectral radius of its Jacobian at the solution; for each solver, the evaluations of f until every
sample has a true relative residual of 1e-3 and 1e-6, and the time that the solver adds to an evaluation; for each
adjoint, the error of the gradient against a float64 solve, the time of the backward pass in evaluations of f, and what is
held between the passes, in states. Times are those of the processor, on one thread.

    python benchmarks/choosing.py
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from adjoints import ADJOINTS, STOPPING, gradient, held, solve
from hard_maps import BUDGET, MAPS, Map, reached
from harness import save
from torch import Tensor, nn

from equilibria import Anderson, Broyden, Implicit, NewtonKrylov, Picard, Stopping, fixed_point
from equilibria.diagnostics import spectral_radius
from equilibria.models.block import TransformerBlock

SOLVERS: dict[str, Any] = {
    "Anderson()": Anderson(),
    "Anderson(history=5)": Anderson(history=5),
    "Broyden()": Broyden(),
    "NewtonKrylov()": NewtonKrylov(),
    "Picard()": Picard(),
    "Picard(damping=0.5)": Picard(damping=0.5),
}
ROUNDS, SPENT = 9, 16


class Tanh(nn.Module):
    """z = tanh(W z + x) with an orthogonal W times `scale`."""

    def __init__(self, size: int, scale: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linalg.qr(torch.randn(size, size))[0] * scale)

    def prepare(self, x: Tensor) -> tuple[Tensor]:
        return (x,)

    def initial(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(z @ self.weight + x)


def layers() -> dict[str, tuple[Any, Tensor]]:
    """Problem -> (block, its input)."""
    return {
        "tanh, W times 0.6": (Tanh(512, 0.6), 0.5 * torch.randn(128, 512)),
        "tanh, W times 1": (Tanh(512, 1.0), 0.5 * torch.randn(128, 512)),
        "Transformer block": (TransformerBlock(64, 4, 256, init_std=0.03), 2 * torch.randn(8, 32, 192)),
    }


@torch.no_grad()
def solvers() -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for name, make in MAPS.items():
        torch.manual_seed(0)
        f, z0 = make()
        counts: dict[str, Any] = {
            key: {f"{rtol:.0e}": reached(f, z0, solver, rtol) for rtol in (1e-3, 1e-6)} for key, solver in SOLVERS.items()
        }
        one, added = overheads(f, z0)
        for key, milliseconds in added.items():
            counts[key]["added_ms"] = milliseconds
        rows[name] = {"radius": radius_of(f, z0), "f_ms": one, "solvers": counts}
        print(name, rows[name], flush=True)
    return rows


def radius_of(f: Map, z0: Tensor) -> float:
    """The largest spectral radius of a sample, at the solution."""
    z, _ = fixed_point(f, z0, stopping=Stopping(rtol=1e-4, max_evals=BUDGET))
    return float(spectral_radius(f, z).radius.max())


def overheads(f: Map, z0: Tensor) -> tuple[float, dict[str, float]]:
    """Milliseconds of one f, and what each solver adds to it per evaluation, when all of a budget is spent."""
    stopping = Stopping(rtol=0.0, atol=0.0, max_evals=SPENT)

    def evaluate() -> None:
        z = z0
        for _ in range(SPENT):
            z = f(z)

    runs: dict[str, Callable[[], object]] = {
        key: partial(fixed_point, f, z0, solver=solver, stopping=stopping) for key, solver in SOLVERS.items()
    }
    least = {key: 1e3 * seconds for key, seconds in cpu_seconds({"f": evaluate, **runs}).items()}
    spent = {key: fixed_point(f, z0, solver=solver, stopping=stopping).stats.evaluations for key, solver in SOLVERS.items()}
    one = least["f"] / SPENT
    return one, {key: max(0.0, least[key] / spent[key] - one) for key in SOLVERS}


def adjoints() -> dict[str, Any]:
    rows: dict[str, Any] = {}
    torch.manual_seed(0)
    for name, (block, given) in layers().items():
        rows[name] = of_problem(block, given)
        print(name, rows[name], flush=True)
    return rows


def of_problem(block: Any, given: Tensor) -> dict[str, Any]:
    """Every adjoint on one problem."""
    tight = Stopping(rtol=1e-12, atol=0.0, max_evals=1000)
    block, given = block.double(), given.double()
    weight = torch.randn_like(block.initial(given))
    exact, stats = gradient(block, given, weight, Anderson(), Implicit(stopping=tight), tight)
    assert stats.converged.all()
    assert stats.backward[0].converged.all()
    block, given, weight = block.float(), given.float(), weight.float()
    args, z = block.prepare(given), block.initial(given)
    with torch.no_grad():
        z = fixed_point(block, z, *args, stopping=STOPPING).z
        radius = float(spectral_radius(block, z, *args).radius.max())

    def evaluate() -> None:
        with torch.no_grad():
            block(z, *args)

    def forward(solver: Any, adjoint: Any) -> None:
        with torch.no_grad():
            solve(block, given, solver, adjoint, STOPPING)

    runs: dict[str, Callable[[], object]] = {"f": evaluate}
    for key, (solver, adjoint) in ADJOINTS.items():
        runs[key] = partial(gradient, block, given, weight, solver, adjoint, STOPPING)
        runs[f"forward of {key}"] = partial(forward, solver, adjoint)
    least = cpu_seconds(runs)
    rows = {}
    for key, (solver, adjoint) in ADJOINTS.items():
        found, stats = gradient(block, given, weight, solver, adjoint, STOPPING)
        rows[key] = {
            "error": float((found.double() - exact).norm() / exact.norm()),
            "forward_evaluations": stats.evaluations,
            "cost": (least[key] - least[f"forward of {key}"]) / least["f"],
            "held_states": held(block, given, solver, adjoint) / (z.numel() * z.element_size()),
        }
    return {"radius": radius, "adjoints": rows}


def cpu_seconds(runs: dict[str, Callable[[], object]]) -> dict[str, float]:
    """The least processor time of each run over some rounds, which other work on the machine hardly changes."""
    for run in runs.values():
        run()
    least = dict.fromkeys(runs, float("inf"))
    for _ in range(ROUNDS):
        for name, run in runs.items():
            start = time.process_time()
            run()
            least[name] = min(least[name], time.process_time() - start)
    return least


def main() -> None:
    torch.set_num_threads(1)
    save("choosing", {"budget": BUDGET, "rounds": ROUNDS, "solvers": solvers(), "adjoints": adjoints()})


if __name__ == "__main__":
    main()
