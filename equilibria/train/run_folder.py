"""Where a run keeps its files.

config.json          the resolved configuration
command.txt          what was typed, one line for each start
tokenizer/           what turns text into tokens
checkpoints/         step-XXXXXXXX/, the last few, to resume from (see `equilibria.train.checkpoint`)
best/                the weights with the lowest validation loss
failures/            step-XXXXXXXX/, where a loss was not finite (see `equilibria.train.failure`)
metrics.jsonl        one JSON object a line; events for TensorBoard are in tensorboard/
traces.jsonl         a whole solve at each validation, residual after residual
plots/  sample.txt  summary.json
twin/                the explicit twin, a run of its own
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from equilibria.data.disk import present, sync, write_json, write_text
from equilibria.solution import UserError
from equilibria.train.checkpoint import DamagedCheckpoint, load_state, verify
from equilibria.train.checkpoints import Checkpoints, say
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
    def command(self) -> Path:
        """The commands that began and resumed the run."""
        return self.path / "command.txt"

    @property
    def tokenizer(self) -> Path:
        """Folder of the tokenizer's files."""
        return self.path / "tokenizer"

    @property
    def checkpoints(self) -> Checkpoints:
        """The checkpoints to resume from."""
        return Checkpoints(self.path / "checkpoints")

    @property
    def best(self) -> Path:
        """Folder of the weights with the lowest validation loss."""
        return self.path / "best"

    @property
    def failures(self) -> Path:
        """Folder of the steps whose loss was not finite."""
        return self.path / "failures"

    def failure(self, step: int, rollbacks: int = 0) -> Path:
        """Folder of one of them (see `equilibria.train.failure`), which a run may meet again after it was rolled back."""
        return self.failures / (f"step-{step:08d}" + (f"-{rollbacks + 1}" if rollbacks else ""))

    @property
    def weights(self) -> Path:
        """Folder of the weights to use, undamaged: the best, or the last where none was found best.

        Where the best are damaged, standard error says so and which take their place: those of the checkpoint of the same
        step, which are the very same, or else the last.
        """
        if not present(self.best).is_dir():
            return self._newest()
        try:
            verify(self.best)
        except DamagedCheckpoint as error:
            if not self.checkpoints.steps():
                raise
            instead = self._best_checkpoint() or self._newest()
            say(f"{str(error).rpartition('; ')[0]}; using the weights of {instead} instead")
            return instead
        return self.best

    def vocab_size_without_tokenizer(self) -> int | None:
        """Words that the model of a run knows which was converted without its text; None of one with a tokenizer."""
        return None if self.tokenizer.is_dir() else load_state(self.best).get("vocab_size")

    def _newest(self) -> Path:
        """The newest checkpoint without damage."""

        def whole(folder: Path) -> Path:
            verify(folder)
            return folder

        return self.checkpoints.newest(whole)

    def _best_checkpoint(self) -> Path | None:
        """The checkpoint of the step with the lowest validation loss, if it is still kept, and whole."""
        step = self.checkpoints.newest(load_state).get("best_step")
        try:
            if step in self.checkpoints.steps():
                verify(self.checkpoints.path(step))
                return self.checkpoints.path(step)
        except DamagedCheckpoint:
            pass
        return None

    @property
    def metrics(self) -> Path:
        """The metrics, one JSON object a line."""
        return self.path / "metrics.jsonl"

    @property
    def traces(self) -> Path:
        """Solves of validations, one JSON object a line (see `equilibria.train.traces`)."""
        return self.path / "traces.jsonl"

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

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Around training: no other process may train into this folder, which UserError says. A kill ends the hold."""
        lock = FileLock(self.path / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise UserError(
                f"another process trains in {self.path}; wait until it has ended, or give another --run-dir"
            ) from None
        except NotImplementedError:  # a file system without locks
            pass
        try:
            yield
        finally:
            (self.path / ".lock").unlink(missing_ok=True)
            lock.release()

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
        if self.checkpoints.steps():
            return True
        if (self.path / "checkpoint").is_dir():
            raise UserError(f"{self.path} was written by an earlier version of this program; start a new run")
        return False


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
    """Appends rows to metrics.jsonl. A resumed run first drops the rows after the step of its checkpoint.

    What is there stays whole when the process dies, and when the disk is full: a row that does not fit leaves no part.
    """

    def __init__(self, path: Path, *, step: int) -> None:
        kept = [row for row in read_metrics(path) if row["step"] <= step]
        write_text(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in kept))
        self.path = path
        self._file = path.open("ab", buffering=0)  # what a buffer kept of a failed row would come out later

    def append(self, row: dict[str, Any]) -> None:
        """Write one row and hand it to the system at once."""
        line = (json.dumps(row, allow_nan=False) + "\n").encode()
        end = self._file.tell()
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            self._file.truncate(end)
            error.filename = str(self.path)
            raise

    def sync(self) -> None:
        """Force the rows to the disk."""
        sync(self.path)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl, without lines that are damaged, as a kill leaves the last one; [] when there is no file."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_bytes().split(b"\n"):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows
