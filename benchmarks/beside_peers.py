"""This library beside TorchDEQ, jaxopt, optimistix and scipy on the same maps, to the same true residual.

    python3 -m venv peers && ./peers/bin/pip install -r benchmarks/peers/requirements.txt
    ./peers/bin/pip install --no-deps torchdeq==0.1.0 .
    ./peers/bin/python benchmarks/beside_peers.py [--only NAME ...] [--quick]

All in one process, in turn, two threads each. A solve is timed only if the relative residual of every sample, measured anew
in float64, is within the tolerance; each contender is asked for the loosest tolerance of its own for which that is so.
With --only, the rows of other problems stay as they were in the results.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
from collections.abc import Iterable
from typing import Any

THREADS = 2
os.environ.setdefault("OMP_NUM_THREADS", str(THREADS))
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("NPROC", str(THREADS))  # of XLA
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no pool of compilers that wakes up while something is timed

import torch  # noqa: E402
from harness import RESULTS, save  # noqa: E402
from peers.measure import bind_all, of_gradient, of_solve, rows  # noqa: E402
from peers.problems import SUITE, Problem  # noqa: E402

TOLERANCES = (1e-3, 1e-6)
QUICK = ("tanh-0.9-64-32", "orthogonal-64", "lm-128")
GRADIENTS = (
    "tanh-0.9-64-32", "tanh-1.5-64-32", "tanh-0.9-1024-32", "tanh-1.5-1024-32", "orthogonal-64", "uneven",
    "lm-128", "lm-512", "block-0.02", "block-0.05",
)  # fmt: skip
"""Where solve and backward pass are measured; `--only` takes others too."""
PACKAGES = ("torch", "torchdeq", "jax", "jaxopt", "optimistix", "lineax", "scipy", "numpy")


def contenders(compiled: bool) -> list[Any]:
    torch_solvers = importlib.import_module("peers.torch_solvers")

    def too(problem: Problem) -> bool:
        return compiled and len(problem.shape) == 3

    found = [*torch_solvers.equilibria(too), *torch_solvers.torchdeq(too)]
    for name in ("jax_solvers", "scipy_solvers"):
        found += importlib.import_module(f"peers.{name}").contenders()
    return found


def differentiating(compiled: bool) -> list[Any]:
    gradients = importlib.import_module("peers.gradients")
    return [*gradients.in_torch(lambda problem: compiled and len(problem.shape) == 3), *gradients.in_jax()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(SUITE), help="these problems alone")
    parser.add_argument("--part", choices=["solve", "gradient"], help="solves, or those with their backward pass")
    parser.add_argument("--quick", action="store_true", help=f"{', '.join(QUICK)} alone, and nothing is written")
    parser.add_argument("--uncompiled", action="store_true", help="leave out torch.compile of f")
    given = parser.parse_args()
    torch.set_num_threads(THREADS)
    for part in [given.part] if given.part else ["solve", "gradient"]:
        everything = SUITE if part == "solve" else GRADIENTS
        for name in given.only or (QUICK if given.quick else everything):
            found = measured(part, name, not given.uncompiled)
            if not given.quick:
                keep(part, found)


def measured(part: str, name: str, compiled: bool) -> list[dict[str, Any]]:
    """The rows of one problem."""
    torch.compiler.reset()
    problem = SUITE[name]()
    if part == "solve":
        bound, judges = bind_all(problem, contenders(compiled)), {rtol: of_solve(problem, rtol) for rtol in TOLERANCES}
    else:
        exact = importlib.import_module("peers.gradients").exact(problem)
        bound = bind_all(problem, differentiating(compiled))
        judges = {rtol: of_gradient(problem, exact, rtol) for rtol in TOLERANCES}
    found = rows(problem, bound, judges)
    for row in found:
        show(part, row)
    return [{"key": [name, row["rtol"]], **row} for row in found]


def keep(part: str, found: Iterable[dict[str, Any]]) -> None:
    """Put these rows in the place of earlier ones."""
    path = RESULTS / "peers.json"
    parts = json.loads(path.read_text()) if path.is_file() else {"solve": [], "gradient": []}
    merged = {tuple(r["key"]): r for r in [*parts[part], *found]}
    order = [(name, rtol) for name in SUITE for rtol in TOLERANCES]
    parts[part] = [merged[key] for key in sorted(merged, key=order.index)]
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    save("peers", {"versions": versions, **{name: parts[name] for name in ("solve", "gradient")}})


def show(part: str, found: dict[str, Any]) -> None:
    ratios = ", ".join(f"{name} {ratio:.2f}" for name, ratio in found["ratios"].items())
    print(f"\n{part}: {found['problem']}, rtol {found['rtol']:g}, {found['rounds']} rounds; times ours: {ratios}")
    for name, r in found["contenders"].items():
        took = "not reached" if r["milliseconds"] is None else f"{r['milliseconds']:9.3f} ms"
        counts = " + ".join(str(r[key] or "–") for key in ("evaluations", "products")[: 1 + (part == "gradient")])
        values = [f"{key} {r[key]:.1e}" for key in ("residual", "error_of_gradient", "tolerance") if r[key] is not None]
        mark = "*" if name in found["best"].values() else " "
        print(f" {mark}{name:62} {took:12} {counts:>9} evals  {'  '.join(values)}  share {r['share']:.2f}  "
              f"first {r['first_seconds']:.1f} s  {r['failure'] or ''}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
