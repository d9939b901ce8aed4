"""`equilibria eval`: how well the model of a run predicts text, and at what cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from equilibria.cli.load import LoadedRun, device, load_run
from equilibria.cli.parse import parse
from equilibria.diagnostics import spectral_radius
from equilibria.nn.computed_once import computed_once
from equilibria.solution import UserError
from equilibria.train.checks import check_not_negative, check_positive
from equilibria.train.config import RunConfig, TransformerModel
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
    atol: float | None = None
    """Another absolute tolerance."""
    max_evals: int | None = None
    """Another budget of evaluations of f per solve."""
    batch_size: int | None = None
    """Another number of lanes to read the split in."""
    length: int | None = None
    """Another number of tokens of each lane in one segment."""
    mem_len: int | None = None
    """Another number of positions of earlier segments that a segment of a Transformer sees."""
    max_steps: int | None = None
    """Read the first so many segments alone."""
    spectral_radius: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Also estimate the spectral radius of ∂f/∂z at the equilibria of the first segment: below 1, plain iteration
    converges to them."""

    def __post_init__(self) -> None:
        check_positive(self, "max_evals", "batch_size", "length", "max_steps")
        check_not_negative(self, "rtol", "atol", "mem_len")


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
    if options.spectral_radius:
        found = radius_at_equilibrium(options)
        print(_line("spectral radius of the Jacobian", f"{found.mean():.3f}, at most {found.max():.3f}"))
    return 0


def evaluate_run(options: EvalOptions) -> Evaluation:
    """The evaluation that the options ask for."""
    run = _load(options)
    return run.evaluate(run.corpus(options.data_dir), options.split, max_steps=options.max_steps)


@torch.no_grad()
def radius_at_equilibrium(options: EvalOptions) -> torch.Tensor:
    """(B,) the spectral radius of ∂f/∂z at the equilibria of the first segment of the split."""
    run = _load(options)
    if run.config.model.depth is not None:
        raise UserError(f"{options.run} is an explicit stack, which has no equilibrium; leave --spectral-radius out")
    model, split = run.model(), getattr(run.corpus(options.data_dir), options.split)
    lanes = min(run.config.eval_batch_size, split.max_batch_size)
    tokens, _ = split.batches(lanes, run.config.eval_segment, device())[0]
    with computed_once(model):
        injection = model.injection(tokens)
        inputs = model.block_inputs(injection, model.empty_memory(len(tokens)), model.draw_masks(injection))
        args = model.block.prepare(*inputs)
        z, _ = model.deq.solve(model.block.initial(*inputs), *args)
        return spectral_radius(model.block, z, *args).radius


def _load(options: EvalOptions) -> LoadedRun:
    run = load_run(options.run, options.data_dir)
    return dataclasses.replace(run, config=_with_options(run.config, options))


def _with_options(config: RunConfig, options: EvalOptions) -> RunConfig:
    """The configuration of the run with what the options change."""

    def given(**fields: Any) -> dict[str, Any]:
        return {name: value for name, value in fields.items() if value is not None}

    solver = given(eval_rtol=options.rtol, eval_atol=options.atol, eval_max_evals=options.max_evals)
    model = config.model
    if options.mem_len is not None:
        if not isinstance(model, TransformerModel):
            raise UserError(f"--mem-len is {options.mem_len}, but a TrellisNet remembers one position; leave it out")
        model = dataclasses.replace(model, eval_mem_len=options.mem_len)
    return dataclasses.replace(
        config,
        model=model,
        solver=dataclasses.replace(config.solver, **solver),
        **given(eval_batch_size=options.batch_size, eval_length=options.length),
    )


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
    return "\n".join(_line(name, value) for name, value in values)


def _line(name: str, value: str) -> str:
    return f"  {name:<33}{value}"
