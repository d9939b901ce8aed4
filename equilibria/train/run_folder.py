"""Where a run keeps its files.

config.json          the resolved configuration
tokenizer/           what turns text into tokens
checkpoint/          to resume from (see `equilibria.train.checkpoint`)
best/                the weights with the lowest validation loss
metrics.jsonl        one JSON object a line; events for TensorBoard are in tensorboard/
plots/  sample.txt  summary.json
twin/                the explicit twin, a run of its own
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from equilibria.solution import UserError
from equilibria.train.checkpoint import settle_folder, write_json
from equilibria.train.config import RunConfig, load_config, to_json


@dataclass(frozen=True)
class RunFolder:
    """Paths inside the folder of one run."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.json"

    @property
    def tokenizer(self) -> Path:
        """Folder of the tokenizer's files."""
        return self.path / "tokenizer"

    @property
    def checkpoint(self) -> Path:
        """Folder to resume from."""
        return self.path / "checkpoint"

    @property
    def best(self) -> Path:
        """Folder of the weights with the lowest validation loss."""
        return self.path / "best"

    @property
    def weights(self) -> Path:
        """Folder of the weights to use: the best, or the last where none was found best."""
        settle_folder(self.best)
        return self.best if self.best.is_dir() else self.checkpoint

    @property
    def metrics(self) -> Path:
        """The metrics, one JSON object a line."""
        return self.path / "metrics.jsonl"

    @property
    def plots(self) -> Path:
        """Folder of PNG files."""
        return self.path / "plots"

    @property
    def sample(self) -> Path:
        """Generated text."""
        return self.path / "sample.txt"

    @property
    def summary(self) -> Path:
        """What the final screen shows."""
        return self.path / "summary.json"

    @property
    def twin(self) -> RunFolder:
        """The run of the explicit twin."""
        return RunFolder(self.path / "twin")

    def store_config(self, config: RunConfig) -> None:
        """Write config.json, making the folder if need be."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.config, to_json(config))

    def load_config(self) -> RunConfig:
        """The configuration of the run."""
        return load_config(self.config)

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write summary.json."""
        write_json(self.summary, summary)

    def has_checkpoint(self) -> bool:
        """Whether there is something to resume from."""
        return self.checkpoint.is_dir() or self.checkpoint.with_name(".checkpoint.old").is_dir()


def create_run(recipe: str, run_dir: Path | None, root: Path = Path("runs")) -> RunFolder:
    """A new folder: `run_dir`, which must not hold anything yet, or the next free of root/recipe, root/recipe-2, ..."""
    if run_dir is not None:
        if run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
            raise UserError(f"{run_dir} exists already; add --resume to continue it, or give another --run-dir")
        run_dir.mkdir(parents=True, exist_ok=True)
        return RunFolder(run_dir)
    number = 1
    while True:
        path = root / (recipe if number == 1 else f"{recipe}-{number}")
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            number += 1
        else:
            return RunFolder(path)


def newest_run(recipe: str, root: Path = Path("runs")) -> RunFolder:
    """The run of a recipe with the highest number."""
    pattern = re.compile(re.escape(recipe) + r"(?:-(\d+))?")
    numbered = []
    for path in root.iterdir() if root.is_dir() else ():
        match = pattern.fullmatch(path.name)
        if match and (path / "config.json").is_file():
            numbered.append((int(match.group(1) or 1), path))
    if not numbered:
        raise UserError(f"there is no run of {recipe} in {root} to resume; leave out --resume, or give --run-dir")
    return RunFolder(max(numbered)[1])


def open_run(path: Path) -> RunFolder:
    """The folder of an existing run."""
    if not path.is_dir():
        raise UserError(f"there is no run folder {path}; give the folder that `equilibria train` printed")
    if not (path / "config.json").is_file():
        raise UserError(f"{path} is not a run: it has no config.json; give the folder that `equilibria train` printed")
    return RunFolder(path)


class MetricsLog:
    """Appends rows to metrics.jsonl. A resumed run first drops the rows after the step of its checkpoint."""

    def __init__(self, path: Path, *, step: int) -> None:
        kept = [row for row in read_metrics(path) if row["step"] <= step]
        path.write_text("".join(json.dumps(row, allow_nan=False) + "\n" for row in kept), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8")

    def append(self, row: dict[str, Any]) -> None:
        """Write one row and hand it to the system at once."""
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl, without the last one if a kill cut it short; [] when there is no file."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows
