"""What a page needs of a run folder, as plain values: no weights, no corpus, no tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from equilibria.solution import UserError
from equilibria.train.advice import Advice
from equilibria.train.adviser import advise
from equilibria.train.config import from_json
from equilibria.train.run_folder import RunFolder, open_run, read_metrics

Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class RunView:
    """One run, as far as it went. Every part but the configuration may be missing."""

    name: str
    path: Path
    config: dict[str, Any]
    """Of config.json, whichever version wrote it."""
    rows: Sequence[Row]
    """Of metrics.jsonl."""
    traces: Sequence[Row]
    """Of traces.jsonl."""
    summary: dict[str, Any]
    """Of summary.json; empty for a run that is not finished."""
    sample: str
    command: str
    """What was typed, one line for each start."""
    failures: list[dict[str, Any]]
    """Step, reason and folder of each step whose loss was not finite."""
    twin: RunView | None

    def get(self, dotted: str, default: Any = None) -> Any:
        """A value of the configuration, such as "optim.lr"."""
        value: Any = self.config
        for part in dotted.split("."):
            if not isinstance(value, dict) or part not in value:
                return default
            value = value[part]
        return value

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and values of one metric."""
        points = [(row["step"], row[key]) for row in self.rows if key in row]
        return [step for step, _ in points], [value for _, value in points]

    def last(self, key: str) -> Any:
        """The latest value of one metric; None where there is none."""
        return next((row[key] for row in reversed(self.rows) if key in row), None)

    @property
    def step(self) -> int:
        """The latest step in the metrics."""
        return max((row["step"] for row in self.rows), default=0)

    @property
    def is_stack(self) -> bool:
        """Whether the model is an explicit stack, which solves nothing."""
        return self.get("model.depth") is not None

    @cached_property
    def advice(self) -> list[Advice]:
        """What was said in the log of the run."""
        try:
            return advise(self.rows, from_json(self.config, str(self.path)))
        except UserError:  # of another version; its numbers can be shown all the same
            return []


def read_runs(paths: Sequence[Path]) -> list[RunView]:
    """The runs in these folders, each under a name of its own. UserError for a folder that is none."""
    folders = [open_run(path) for path in dict.fromkeys(path.resolve() for path in paths)]
    return [_read(folder, name) for folder, name in zip(folders, _names([each.path for each in folders]), strict=True)]


def _read(folder: RunFolder, name: str) -> RunView:
    twin = folder.twin
    return RunView(
        name=name,
        path=folder.path,
        config=_json(folder.config, required=True),
        rows=read_metrics(folder.metrics),
        traces=read_metrics(folder.traces),
        summary=_json(folder.summary),
        sample=_text(folder.sample),
        command=_text(folder.command),
        failures=[_failure(path) for path in sorted((folder.path / "failures").glob("step-*"))],
        twin=_read(twin, f"{name}, twin") if twin.config.is_file() else None,
    )


def _names(paths: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as many as it takes to tell them apart."""
    for count in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-count:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def _failure(path: Path) -> dict[str, Any]:
    state = _json(path / "state.json")
    return {"folder": path.name, "step": state.get("step"), "reason": state.get("reason", "")}


def _json(path: Path, *, required: bool = False) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        if not required:
            return {}
        raise UserError(f"cannot read {path}: {error}; give the folder of a run") from error
    return values if isinstance(values, dict) else {}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
