"""Our model beside its explicit twin, the same block stacked: what a step of each costs, and how well both predict."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness import interleaved, median_ratio
from lm_step.ours import Ours
from lm_step.sides import Sides

from equilibria import Stopping
from equilibria.cli.load import LoadedRun
from equilibria.recipes.build import build_adjoint
from equilibria.train.evaluate import evaluate

DEPTH = 8
"""Layers of the twin where no run says so."""
LOOSER = (1e-2, 3e-2, 1e-1, 3e-1)
"""Relative tolerances of evaluation."""


def twin(run: LoadedRun, other: LoadedRun | None, data_dir: Path | None, sides: Sides, rounds: int) -> dict[str, Any]:
    """Times of both, ours as the recipe solves; with a run of the twin the perplexities on the test split too."""
    config = run.config
    depth = (other.config.model.depth if other else None) or DEPTH
    ours, stack = sides.ours, Ours(sides.shape, depth=depth)
    if other is not None:
        stack.model.load_state_dict(other.model().state_dict())
    else:
        stack.model.load_state_dict(sides.weights)
    batch = sides.batch(ours)
    adjoint = build_adjoint(config.solver)
    by_recipe = Stopping(rtol=config.solver.rtol, atol=config.solver.atol, max_evals=config.solver.max_evals)
    ours.solve_to("anderson", by_recipe, adjoint)
    ours.model.train()
    output = ours.model(*batch)
    output.nll.mean().backward()
    (stats,) = output.stats
    counts = {"forward": stats.evaluations, "backward": stats.backward[0].evaluations}
    result: dict[str, Any] = {"depth": depth, "rtol": config.solver.rtol, "steps_trained": config.optim.steps}
    runs: dict[str, Callable[[], object]] = {"equilibria": lambda: ours.step(batch), "twin": lambda: stack.step(batch)}
    result["training"] = compared(runs, rounds) | {"counts": counts, "residual": float(stats.relative.max())}
    result["evaluation"] = {}
    for rtol in LOOSER:
        stopping = Stopping(rtol=rtol, atol=0.0, max_evals=30)

        def ours_evaluates(stopping: Stopping = stopping) -> None:
            ours.solve_to("anderson", stopping, adjoint)
            ours.evaluate(batch)

        row = compared({"equilibria": ours_evaluates, "twin": lambda: stack.evaluate(batch)}, rounds)
        if other is not None:
            ours.solve_to("anderson", stopping, adjoint)
            row |= predicted(run, ours, data_dir)
        result["evaluation"][f"{rtol:.0e}"] = row
    if other is not None:
        result["twin_perplexity"] = predicted(run, stack, data_dir)["perplexity"]
    return result


def compared(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Milliseconds of each, and ours over the twin's."""
    seconds = interleaved(runs, rounds)
    medians = {f"{name}_ms": 1e3 * statistics.median(values) for name, values in seconds.items()}
    return {**medians, "ratio": median_ratio(seconds["equilibria"], seconds["twin"])}


def predicted(run: LoadedRun, side: Ours, data_dir: Path | None) -> dict[str, float | None]:
    """Perplexity on the test split, and evaluations of f per solve."""
    split = run.corpus(data_dir).test
    config = run.config
    found = evaluate(side.model, split, batch_size=config.eval_batch_size, length=config.eval_segment, depth=side.depth)
    return {"perplexity": found.perplexity, "evaluations": found.evaluations}
