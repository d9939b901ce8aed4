"""A training and an evaluation step of a language model beside the original code's and TorchDEQ's.

The peers are in no package index: give checkouts of locuslab/deq (2021) and locuslab/torchdeq. Weights and text are those
of a run of ours, such as

    equilibria train penn-treebank-transformer --steps 500 --twin-depth 8 --run-dir RUN

which the original gets through `equilibria.interop`; before anything is timed, f and the loss must agree at one state.
TorchDEQ's own model is another function of the same size, and takes part where evaluations are equal; where residuals are,
its solvers run in the original's model. Every side takes the step of its own training loop, with a rate of 0, so that all
steps are alike.

    python benchmarks/language_model_step.py --deq DIR --torchdeq DIR --run RUN --data-dir DIR
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from harness import RESULTS, interleaved, median_ratio, save
from lm_step.sides import Sides
from lm_step.twin import twin
from lm_step.ways import Way, solved, trained, ways
from memory import peak

from equilibria.cli.load import LoadedRun, load_run
from equilibria.train.memory import keep_freed_memory

NAME = "language_model_step"
PATH = RESULTS / f"{NAME}.json"
EVALUATIONS, BUDGET = 9, 30
TOLERANCES = (1e-2, 1e-3)
ALLOWED = 3.0
"""Relative error of the gradient over the relative residual that is asked for."""
KEPT = 2
"""Ways of each library that are timed in full, the fastest in a first trial."""
Part = Literal["evaluations", "search", "residual", "dropout", "twin", "memory", "kept"]
Row = dict[str, Any]
Keep = Callable[[], None]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to compare, and how long."""

    deq: Path
    """Checkout of locuslab/deq."""
    torchdeq: Path
    """Checkout of locuslab/torchdeq."""
    run: Path
    """Folder of the run that gives the size, the weights and the text."""
    twin: Path | None = None
    """Folder of its explicit twin; None: RUN/twin, if it is there. Both may be others than those of the other parts, where
    `--only twin` is measured."""
    data_dir: Path | None = None
    """Where the text of the run is now."""
    only: tuple[Part, ...] = ("evaluations", "search", "residual", "dropout", "twin", "memory", "kept")
    """Parts to measure anew; the others stay as stored. `search` finds the budgets of `residual`, where not stored.
    `kept` is `evaluations` after the C library was told to keep freed memory, as `equilibria train` tells it."""
    tolerances: tuple[float, ...] = TOLERANCES
    """Relative residuals of the parts `search` and `residual`."""
    rounds: int = 7
    """Times that each way takes its step, in turn."""
    threads: int = 1
    """Of torch."""


def timed(found: Sequence[Way], step: Callable[[Way], object], rounds: int) -> dict[str, Any]:
    """Milliseconds of each way, and of the fastest of each library over those of our fastest."""

    def runs(chosen: Sequence[Way]) -> dict[str, Callable[[], object]]:
        return {way.name: lambda way=way: step(way) for way in chosen}

    trial = {name: seconds[0] for name, seconds in interleaved(runs(found), 1).items()}
    of_library: dict[str, list[Way]] = {}
    for way in sorted(found, key=lambda way: trial[way.name]):
        of_library.setdefault(way.library, []).append(way)
    seconds = interleaved(runs([way for those in of_library.values() for way in those[:KEPT]]), rounds)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    best = {library: min(those[:KEPT], key=lambda way: medians[way.name]).name for library, those in of_library.items()}
    mine = seconds[best["equilibria"]]
    rows = [
        {
            "name": way.name,
            "library": way.library,
            "forward": way.forward.evaluations,
            "backward": way.backward.evaluations,
            "trial_ms": 1e3 * trial[way.name],
            "ms": 1e3 * medians[way.name] if way.name in medians else None,
        }
        for way in found
    ]
    ratios = {library: median_ratio(seconds[name], mine) for library, name in best.items() if library != "equilibria"}
    return {"rows": rows, "best": best, "ratios": ratios}


def at_equal_evaluations(sides: Sides, rounds: int) -> Row:
    """Both steps, every way with as many evaluations and products."""
    found = sides.at_equal_evaluations(EVALUATIONS)
    return {
        "evaluations": EVALUATIONS,
        "training": timed(found, Way.step, rounds),
        "evaluation": timed(once_forward(found), Way.evaluate, rounds),
    }


def once_forward(found: Sequence[Way]) -> list[Way]:
    """One way of each forward solver: an evaluation step has no backward pass."""
    return list({(way.library, way.side.name, way.forward): way for way in reversed(found)}.values())[::-1]


def search(sides: Sides, tol: float, found: Row, keep: Keep) -> None:
    """For every way the fewest evaluations that reach `tol`, and in training a gradient as good; None where none do.

    Those of `found` are known already; each further one is kept at once, for this takes long.
    """
    contenders, reference = sides.at_equal_residual(tol), sides.reference()
    found["allowed_error"] = ALLOWED * tol
    for kind, ways_of in (("training", contenders), ("evaluation", once_forward(contenders))):
        known = found.setdefault(kind, {})
        for way in ways_of:
            if way.name in known:
                continue
            training = kind == "training"
            done = trained(way, tol, reference, ALLOWED * tol) if training else solved(way, tol, training=False)
            known[way.name] = done and [done.forward.evaluations, done.backward.evaluations, done.forward.tol]
            print(f"{tol:g}, {kind}  {way.name}: {known[way.name]}", flush=True)
            keep()


def at_equal_residual(sides: Sides, tol: float, budgets: Row, rounds: int) -> Row:
    """Both steps, with the budgets that `search` found, which are checked once more."""
    contenders = {way.name: way for way in sides.at_equal_residual(tol)}
    reference = sides.reference()
    result: Row = {}
    for kind, step in (("training", Way.step), ("evaluation", Way.evaluate)):
        reached = [contenders[name].spending(*spent) for name, spent in budgets[kind].items() if spent]
        checks = []
        for way in reached:
            check = {"residual": way.residual(training=kind == "training")}
            if kind == "training":
                check["error"] = way.error(reference)(way.backward.evaluations)
            if check["residual"] > tol or check.get("error", 0.0) > budgets["allowed_error"]:
                raise RuntimeError(f"{way.name} does not come to {tol:g} with what was found: {check}; search anew")
            checks.append(check)
        result[kind] = timed(reached, step, rounds)
        for row, check in zip(result[kind]["rows"], checks, strict=True):
            row |= check
    return result


def memory(sides: Sides) -> Row:
    """MiB that tensors hold at most in a training step, gradients included, beyond what is held before it."""
    ours, theirs = sides.batch(sides.ours), sides.batch(sides.original)
    found = [
        *ways("equilibria", sides.ours, ours, [("anderson", "gmres"), ("anderson", "gmres, restart 8")], BUDGET),
        *ways("original", sides.original, theirs, [("original anderson", "original broyden")], BUDGET),
        *ways("original", sides.original, theirs, [("original broyden", "original broyden")], BUDGET),
    ]
    rows = {}
    for way in found:
        way.step()
        way.side.model.zero_grad()
        rows[way.name] = peak(way.step)
    return {"budget": BUDGET, "peak_mib": rows}


def run_part(part: Part, options: Options, run: LoadedRun, sides: Sides, result: Row, keep: Keep) -> None:
    """Measure one part and put it into the result."""
    if part in ("evaluations", "kept"):
        if part == "kept":
            keep_freed_memory()
        result[part] = at_equal_evaluations(sides, options.rounds)
    elif part == "search":
        for tol in options.tolerances:
            search(sides, tol, result.setdefault(part, {}).setdefault(f"{tol:.0e}", {}), keep)
    elif part == "residual":
        for tol in options.tolerances:
            key = f"{tol:.0e}"
            result.setdefault(part, {})[key] = at_equal_residual(sides, tol, result["search"][key], options.rounds)
    elif part == "dropout":
        dropped = Sides(options.deq, options.torchdeq, run, options.data_dir, dropout=0.1)
        found = dropped.at_equal_evaluations(EVALUATIONS)
        result[part] = {"dropout": 0.1, "evaluations": EVALUATIONS, "training": timed(found, Way.step, options.rounds)}
    elif part == "twin":
        folder = options.twin or options.run / "twin"
        other = load_run(folder, options.data_dir) if folder.is_dir() else None
        result[part] = twin(run, other, options.data_dir, sides, options.rounds)
    else:
        result[part] = memory(sides)


def stored() -> Row:
    """What was measured before, by size."""
    return json.loads(PATH.read_text())["sizes"] if PATH.exists() else {}


def main(options: Options) -> None:
    run = load_run(options.run, options.data_dir)
    torch.set_num_threads(options.threads)
    sides = Sides(options.deq, options.torchdeq, run, options.data_dir)
    size = str(sides.shape.d_model)
    result = stored().get(size, {})
    result |= {"shape": dataclasses.asdict(sides.shape), "agreement": sides.agree()}
    result["parameters"] = sum(p.numel() for p in sides.ours.model.parameters())
    if set(options.only) != {"twin"}:
        result["steps_trained"] = run.config.optim.steps

    def keep() -> None:
        save(NAME, {"sizes": {**stored(), size: result}})

    for part in options.only:
        run_part(part, options, run, sides, result, keep)
        print(part, json.dumps(result[part], indent=1))
        keep()


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
