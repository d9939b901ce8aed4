"""What a page says in words and tables: the outcome, the comparison, the configuration."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from equilibria.train.html.reading import RunView
from equilibria.train.shown import shown_perplexity, shown_time
from equilibria.train.trackers import flat

Values = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of the comparison."""

    label: str
    value: Callable[[RunView, Values], Any]
    """From a model and its part of summary.json, which may be empty."""
    form: str | Callable[[Any], str]
    best: Callable[[Sequence[Any]], Any] | None = None
    """Which value of several is the best, if one is."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A cell, and whether it is the best of its column."""

    text: str
    best: bool = False


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line of the comparison."""

    name: str
    colour: int
    twin: bool
    measured: str
    """Which split its results are of."""
    cells: Sequence[Cell]


def _result(name: str, valid: str | None = None) -> Callable[[RunView, Values], Any]:
    """A test result, or else that of the last validation."""
    return lambda run, part: part.get("test", {}).get(name) if part else run.last(f"valid/{valid or name}")


def _mean(key: str) -> Callable[[RunView, Values], Any]:
    def over_rows(run: RunView, _: Values) -> float | None:
        values = run.series(key)[1]
        return sum(values) / len(values) if values else None

    return over_rows


COLUMNS = (
    Column(label="bits per byte", value=_result("bits_per_byte"), form="{:.3f}", best=min),
    Column(label="perplexity", value=_result("perplexity"), form=shown_perplexity, best=min),
    Column(label="evaluations per solve", value=_result("evaluations"), form="{:.1f}"),
    Column(label="relative residual", value=_result("residual"), form="{:.1e}"),
    Column(label="in training, forward", value=_mean("forward/evaluations"), form="{:.1f}"),
    Column(label="backward", value=_mean("backward/evaluations"), form="{:.1f}"),
    Column(label="steps", value=lambda run, part: part.get("steps") or run.step or None, form="{:,}"),
    Column(label="tokens", value=lambda run, part: part.get("tokens") or run.last("train/tokens"), form="{:,}"),
    Column(label="parameters", value=lambda run, part: part.get("parameters"), form="{:,}"),
    Column(label="time", value=lambda run, part: part.get("train_seconds") or run.last("seconds"), form=shown_time),
    Column(label="tokens/s", value=lambda run, part: part.get("tokens_per_second") or run.last("train/tokens_per_second"),
           form="{:,.0f}", best=max),
    Column(label="peak memory, MiB", form="{:,.0f}", best=min,
           value=lambda run, part: (part.get("peak_memory_bytes") or run.last("train/memory_bytes") or 0) / 2**20 or None),
)  # fmt: skip


def comparison(runs: Sequence[RunView]) -> tuple[list[str], list[Line]]:
    """The heads of the columns in use, and a line for each run and twin."""
    models = [
        (index, run, run.summary.get(part) or {}, twin)
        for index, whole in enumerate(runs)
        for run, part, twin in ((whole, "model", False), (whole.twin, "twin", True))
        if run is not None
    ]
    # A twin's results are in the summary of its run.
    models = [
        (index, run, runs[index].summary.get("twin") or {} if twin else part, twin) for index, run, part, twin in models
    ]
    values = [[column.value(run, part) for column in COLUMNS] for _, run, part, _ in models]
    used = [index for index in range(len(COLUMNS)) if any(row[index] is not None for row in values)]
    fair = len({(run.get("data.corpus"), run.get("data.vocab_size"), bool(part)) for _, run, part, _ in models}) == 1
    lines = []
    for (colour, run, part, twin), row in zip(models, values, strict=True):
        cells = [_cell(COLUMNS[index], row[index], [each[index] for each in values], fair) for index in used]
        measured = "test" if part else "validation" if run.last("valid/loss") is not None else ""
        lines.append(Line(name=run.name, colour=colour, twin=twin, measured=measured, cells=cells))
    return [COLUMNS[index].label for index in used], lines


def _cell(column: Column, value: Any, values: Sequence[Any], fair: bool) -> Cell:
    if value is None:
        return Cell(text="")
    known = [each for each in values if each is not None]
    best = fair and column.best is not None and len(known) > 1 and value == column.best(known)
    return Cell(text=column.form.format(value) if isinstance(column.form, str) else column.form(value), best=best)


def model_name(run: RunView) -> str:
    """Such as "DEQ-Transformer"."""
    family = {"transformer": "Transformer", "trellisnet": "TrellisNet"}.get(run.get("model.family"), "model")
    return f"explicit {family} of {run.get('model.depth')} blocks" if run.is_stack else f"DEQ-{family}"


def state(run: RunView) -> str:
    """How far the run came."""
    steps = run.get("optim.steps")
    if not run.rows:
        return "no metrics: converted, or not begun"
    if run.step >= (steps or 0) or run.summary:
        return f"finished, {run.step:,} steps" + (f" of {steps:,}" if steps and run.step < steps else "")
    if run.failures and (run.failures[-1]["step"] or 0) >= run.step:
        return f"failed at step {run.failures[-1]['step']:,} of {steps:,}"
    return f"unfinished, step {run.step:,} of {steps:,}"


def outcome(run: RunView) -> str:
    """One sentence on what was achieved."""
    model, test = run.summary.get("model") or {}, (run.summary.get("model") or {}).get("test") or {}
    subject = f"A {model_name(run)} on {run.get('data.corpus', 'an unknown corpus')}"
    if not test:
        if run.last("valid/loss") is None:
            return f"{subject}; nothing has been measured yet."
        return f"{subject}: {_coded(run.last('valid/bits_per_byte'), run.last('valid/perplexity'))} at the last validation."
    others = []
    if twin := (run.summary.get("twin") or {}).get("test"):
        others.append(f"its explicit twin of {run.summary['twin']['depth']} blocks reaches "
                      f"{_coded(twin.get('bits_per_byte'), twin.get('perplexity'), short=True)}")  # fmt: skip
    if (xz := run.summary.get("xz_bits_per_byte")) is not None:
        others.append(f"xz -9 {xz:.3f} bits per byte")
    beside = f"; {', '.join(others)}" if others else ""
    coded = _coded(test.get("bits_per_byte"), test.get("perplexity"))
    return f"{subject}: {coded} on the test text after {model.get('tokens', 0):,} tokens of training{beside}."


def tiles(run: RunView) -> list[tuple[str, str]]:
    """The numbers that one looks for first: what, how much."""
    heads, lines = comparison([run])
    shown = dict(zip(heads, (cell.text for cell in lines[0].cells), strict=True))
    split = lines[0].measured
    wanted = {
        "bits per byte": f"bits per byte, {split}", "perplexity": f"perplexity, {split}",
        "evaluations per solve": "evaluations per solve", "tokens": "tokens", "time": "time of training",
        "parameters": "parameters",
    }  # fmt: skip
    return [(label, shown[head]) for head, label in wanted.items() if shown.get(head)]


def groups(run: RunView) -> list[tuple[str, list[tuple[str, str]]]]:
    """The whole configuration, by group."""
    single = {key: value for key, value in run.config.items() if not isinstance(value, dict)}
    grouped = [("run", single), *((key, value) for key, value in run.config.items() if isinstance(value, dict))]
    return [(name, [(key, shown(value)) for key, value in flat(values).items()]) for name, values in grouped]


def differences(runs: Sequence[RunView]) -> list[tuple[str, list[str]]]:
    """The options in which the runs differ, with the value that each has."""
    flats = [flat(run.config) for run in runs]
    keys = dict.fromkeys(key for each in flats for key in each)
    rows = [(key, [shown(each.get(key, "")) for each in flats]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def shown(value: Any) -> str:
    """A value as one would type it."""
    if value in ("None", ""):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def remedy_parts(remedy: str) -> list[tuple[str, bool]]:
    """The words of a remedy, and whether they are to be typed.

    >>> remedy_parts("--lr 0.1, or --no-twin, which")
    [('--lr 0.1', True), (', or ', False), ('--no-twin', True), (', which', False)]
    """
    parts = re.split(r"(--[a-z0-9-]+(?: (?:no|[0-9][0-9.e-]*))?(?: --[a-z0-9-]+ [0-9][0-9.e-]*)*)", remedy)
    return [(part, part.startswith("--")) for part in parts if part]


def _coded(bits: float | None, perplexity: float | None, *, short: bool = False) -> str:
    parts = [] if bits is None else [f"{bits:.3f} bits per byte"]
    if perplexity is not None and not (short and parts):
        parts.append(f"perplexity {shown_perplexity(perplexity)}")
    return ", ".join(parts)
