"""`equilibria eval`: how well the model of a run predicts text, and at what cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from equilibria.cli.load import load_run
from equilibria.cli.parse import parse
from equilibria.train.evaluate import Evaluation


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """Options of `equilibria eval`."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of the run (its twin is in RUN/twin)."""
    split: Literal["test", "valid", "train"] = "test"
    """Part of the text to read."""
    data_dir: Path | None = None
    """Folder with the files of the corpus; None: where they were in training."""
    rtol: float | None = None
    """Another relative tolerance of the solves."""
    max_evals: int | None = None
    """Another budget of evaluations of f per solve."""


def eval_command(argv: Sequence[str]) -> int:
    """Run `equilibria eval` and print the result."""
    options = parse(
        EvalOptions,
        argv,
        command="equilibria eval",
        description="Measure how well the best weights of a run predict a split of its corpus.",
    )
    result = evaluate_run(options)
    print(f"{options.run}, {options.split} split\n{show(result)}")
    return 0


def evaluate_run(options: EvalOptions) -> Evaluation:
    """The evaluation that the options ask for."""
    run = load_run(options.run, options.data_dir)
    solver = run.config.solver
    if options.rtol is not None:
        solver = dataclasses.replace(solver, eval_rtol=options.rtol)
    if options.max_evals is not None:
        solver = dataclasses.replace(solver, eval_max_evals=options.max_evals)
    run = dataclasses.replace(run, config=dataclasses.replace(run.config, solver=solver))
    return run.evaluate(run.corpus(options.data_dir), options.split)


def show(result: Evaluation) -> str:
    """The lines that `equilibria eval` prints."""
    values = [
        ("perplexity per token", f"{result.perplexity:,.2f}"),
        ("nats per token", f"{result.nll:.4g}" if result.nll < 1e-3 else f"{result.nll:.4f}"),
        ("tokens", f"{result.tokens:,} in {result.seconds:.1f} s, {result.tokens_per_second:,.0f} a second"),
    ]
    if result.bits_per_byte is not None:
        values.insert(0, ("bits per byte", f"{result.bits_per_byte:.4f}"))
    if result.evaluations is not None:
        values += [
            ("evaluations of f per solve", f"{result.evaluations:.1f}"),
            ("relative residual", f"{result.residual:.1e}"),
            ("samples above the tolerance", f"{100 * (result.unconverged or 0):.0f} %"),
        ]
    return "\n".join(f"  {name:<30}{value}" for name, value in values)
