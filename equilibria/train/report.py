"""What a run achieved: the values of summary.json, and the one screen that shows them."""

from __future__ import annotations

import dataclasses
import lzma
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from equilibria.train.advice import dropout_option
from equilibria.train.config import RunConfig
from equilibria.train.evaluate import Evaluation
from equilibria.train.shown import shown_path, shown_perplexity, shown_time
from equilibria.train.state import TrainState
from equilibria.train.typed import without


def xz_bits_per_byte(text: str) -> float:
    """Size of the text under `xz -9`, in bits for each of its UTF-8 bytes. xz sees nothing but this text.

    >>> xz_bits_per_byte("0123456789" * 1000) < 1
    True
    """
    raw = text.encode()
    return 8 * len(lzma.compress(raw, preset=9)) / len(raw)


def describe_model(
    parameters: int, depth: int | None, state: TrainState, rows: Sequence[Mapping[str, Any]], test: Evaluation
) -> dict[str, Any]:
    """What summary.json says of one model: its size, its training (means over the rows of metrics) and its test."""
    return {
        "depth": depth,
        "parameters": parameters,
        "steps": state.step,
        "tokens": state.tokens,
        "best_step": state.best_step,
        "best_valid_loss": state.best_nll,
        "train_seconds": round(state.train_seconds, 3),
        "tokens_per_second": state.tokens / state.train_seconds if state.train_seconds else None,
        "peak_memory_bytes": state.peak_memory,
        "forward_evaluations": _mean(rows, "forward/evaluations"),
        "backward_evaluations": _mean(rows, "backward/evaluations"),
        "residual": _mean(rows, "forward/residual"),
        "unconverged": _mean(rows, "forward/unconverged"),
        "test": dataclasses.asdict(test),
    }


def render(summary: Mapping[str, Any], config: RunConfig, typed: Sequence[str] = ()) -> str:
    """The final screen: the model beside its twin and xz, where everything is, and what to try next.

    `typed` are the options of the command that began the run, which the commands to try repeat.
    """
    model, twin = summary["model"], summary.get("twin")
    name = "DEQ" if model["depth"] is None else f"stack of {model['depth']}"
    heads = [name, *([f"twin, {twin['depth']} blocks"] if twin else [])]
    columns = [_column(model), *([_column(twin)] if twin else [])]
    if summary["xz_bits_per_byte"] is not None:
        heads.append("xz -9")
        columns.append({BITS: f"{summary['xz_bits_per_byte']:.3f}"})
    width = max(len(label) for label in ROWS) + 2
    lines = [
        f"{summary['recipe']}: {model['steps']:,} steps, {model['tokens']:,} tokens, "
        f"{shown_time(summary['seconds'])} of training and validation",
        "",
        " " * width + "".join(f"{head:>20}" for head in heads),
    ]
    for label in ROWS:
        cells = [column.get(label, "") for column in columns]
        if any(cells):
            lines.append((f"{label:<{width}}" + "".join(f"{cell:>20}" for cell in cells)).rstrip())
    sample = "sample.txt, " if summary["sample"] else ""
    events = ", TensorBoard events" if "tensorboard" in config.trackers else ""
    lines += ["", f"saved in {summary['folder']}: plots, {sample}summary.json, metrics.jsonl{events}", ""]
    lines += ["what to try next", *(f"  {why:<32}{command}" for command, why in _next(summary, config, typed))]
    return "\n".join(lines)


BITS = "test bits per byte"
ROWS = (
    BITS,
    "test perplexity per token",
    "test nats per token",
    "evaluations of f per solve, test",
    "  in training, forward + backward",
    "relative residual, test",
    "  samples above the tolerance",
    "parameters",
    "training time",
    "training tokens per second",
    "peak memory of the process",
)


def _column(model: Mapping[str, Any]) -> dict[str, str]:
    test = model["test"]
    cells = {
        "test perplexity per token": shown_perplexity(test["perplexity"]),
        "test nats per token": f"{test['nll']:.3g}",
        "parameters": f"{model['parameters']:,}",
        "training time": shown_time(model["train_seconds"]),
        "peak memory of the process": f"{model['peak_memory_bytes'] / 2**20:,.0f} MiB",
    }
    if test["bits_per_byte"] is not None:
        cells[BITS] = f"{test['bits_per_byte']:.3f}"
    if model["tokens_per_second"]:
        cells["training tokens per second"] = f"{model['tokens_per_second']:,.0f}"
    if test["evaluations"] is None:
        cells["evaluations of f per solve, test"] = f"{model['depth']}"
        return cells
    cells["evaluations of f per solve, test"] = f"{test['evaluations']:.1f}"
    cells["relative residual, test"] = f"{test['residual']:.1e}"
    cells["  samples above the tolerance"] = f"{100 * test['unconverged']:.0f} %"
    if model["forward_evaluations"] is not None:
        backward = model["backward_evaluations"]
        both = f"{model['forward_evaluations']:.1f}" + (f" + {backward:.1f}" if backward is not None else "")
        cells["  in training, forward + backward"] = both
    return cells


def _next(summary: Mapping[str, Any], config: RunConfig, typed: Sequence[str]) -> list[tuple[str, str]]:
    run, model = shlex.quote(summary["folder"]), summary["model"]
    again = f"equilibria train {summary['recipe']} --resume --run-dir {run}"

    def anew(option: str, value: float) -> str:
        """The command of the run with one option changed."""
        own = without(typed, "data-dir", option)
        if config.data.data_dir is not None:
            own += ["--data-dir", shown_path(config.data.data_dir)]
        return shlex.join(["equilibria", "train", summary["recipe"], *own, f"--{option}", f"{value:g}"])

    hints = [(f'equilibria generate {run} --prompt "The " --compare', "write text")] if summary["sample"] else []
    if model["depth"] is None:
        rtol = config.solver.rtol if config.solver.eval_rtol is None else config.solver.eval_rtol
        hints.append((f"equilibria eval {run} --rtol {10 * (rtol or 1e-3):g}", "fewer evaluations"))
    hints.append((f"equilibria report {run}", "see all of it on one page"))
    if "tensorboard" in config.trackers:
        hints.append((f"tensorboard --logdir {run}", "watch the curves"))
    if model["depth"] is None and (model["unconverged"] or 0) > 0.5:
        hints.append((anew("max-evals", 2 * config.solver.max_evals), "most solves spent their budget"))
    if model["steps"] < config.optim.steps and config.optim.minutes is not None:
        hints.append(
            (f"{again} --minutes {2 * config.optim.minutes:g}", f"stopped by --minutes, of {config.optim.steps:,}")
        )
    elif model["best_step"] == model["steps"]:
        hints.append((f"{again} --steps {2 * model['steps']}", "it was still improving"))
    else:
        option, dropout = dropout_option(config)
        more = min(round(dropout + 0.1, 2), 0.9)
        hints.append((anew(option.removeprefix("--"), more), f"best at step {model['best_step']:,}"))
    return hints


def _mean(rows: Sequence[Mapping[str, Any]], key: str) -> float | None:
    values = [row[key] for row in rows if key in row]
    return sum(values) / len(values) if values else None
