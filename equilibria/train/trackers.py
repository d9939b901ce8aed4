"""Experiment trackers, through the classes of Accelerate: TensorBoard, Weights & Biases, MLflow, Trackio.

What they are sent is in metrics.jsonl already. So a tracker that fails, for want of a network or of space, costs one line
of warning and never the run; it is tried again now and then, and then gets the rows that it missed.
"""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker, MLflowTracker, TensorBoardTracker, TrackioTracker, WandBTracker

from equilibria.data.disk import write_json
from equilibria.solution import UserError
from equilibria.train.run_folder import RunFolder

RETRY_SECONDS = 300.0
"""Time after which a tracker that failed is tried again."""
MOST_WAITING = 10_000
"""Rows that are kept for it meanwhile, the latest."""


def check_trackers(names: Sequence[str]) -> None:
    """Raise UserError, which says what to install, if the package of a tracker is missing."""
    missing = [name for name in names if name != "none" and importlib.util.find_spec(name) is None]
    if missing:
        extra = missing[0] if len(missing) == 1 else "trackers"
        extra = "lm" if missing == ["tensorboard"] else extra
        are = "is" if len(missing) == 1 else "are"
        raise UserError(
            f"--trackers {' '.join(names)}: {' and '.join(missing)} {are} not installed; "
            f'install with: pip install "equilibria[{extra}]", or give --trackers none'
        )


class Trackers:
    """The trackers of one run, by name, from `open` to `close`.

    A resumed run goes on with the tracker runs that it began: their ids are kept in trackers.json of the run folder. `say`
    is called with each warning.
    """

    def __init__(self, names: Sequence[str], folder: RunFolder, *, project: str, say: Callable[[str], None]) -> None:
        check_trackers(names)
        self._folder = folder
        self._tracked = [Tracked(_make(name, folder, project), say) for name in names if name != "none"]

    def open(self, *, step: int, config: Mapping[str, Any]) -> None:
        """Start or continue each; `step` is that of the checkpoint to go on from, `config` the hyperparameters."""
        for tracked in self._tracked:
            tracked.do(lambda tracker: tracker.begin(self._folder, step, flat(config)))

    def log(self, row: Mapping[str, float], step: int) -> None:
        """Send a row to each."""
        for tracked in self._tracked:
            tracked.do(lambda tracker: tracker.log(dict(row), step=step))

    def close(self) -> None:
        """Finish each."""
        for tracked in self._tracked:
            tracked.finish()


class Tracked:
    """One tracker and what it has still to be sent. No failure of it gets out."""

    def __init__(self, tracker: Any, say: Callable[[str], None], retry: float = RETRY_SECONDS) -> None:
        self._tracker, self._say, self._retry = tracker, say, retry
        self._waiting: list[Callable[[Any], None]] = []
        self._failed_at: float | None = None
        self._warned = False

    def do(self, action: Callable[[Any], None]) -> None:
        """Do this after all that waits; if that fails, let it wait."""
        self._waiting.append(action)
        if len(self._waiting) > MOST_WAITING:
            del self._waiting[1]  # the first may be the beginning
        if self._failed_at is None or time.monotonic() - self._failed_at >= self._retry:
            self._catch_up()

    def finish(self) -> None:
        """Send what waits, and end."""
        if self._waiting:
            self._catch_up()
        try:
            self._tracker.finish()
        except Exception as error:
            self._warn(error)

    def _catch_up(self) -> None:
        try:
            while self._waiting:
                self._waiting[0](self._tracker)
                del self._waiting[0]
        except Exception as error:
            self._failed_at = time.monotonic()
            self._warn(error)
        else:
            self._failed_at = None

    def _warn(self, error: Exception) -> None:
        if self._warned:
            return
        self._warned = True
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        self._say(f"the tracker {self._tracker.name} failed ({reason}); training goes on, and metrics.jsonl has everything")


# -- the trackers: what each needs to begin, and to go on where it was ----------------------------------------------


class _TensorBoard(TensorBoardTracker):
    """Events in the run folder. Those after the step of the checkpoint are purged when the run goes on."""

    def begin(self, folder: RunFolder, step: int, config: dict[str, Any]) -> None:
        self.init_kwargs = {"purge_step": step + 1} if step else {}
        self.start()
        if not step:
            self.store_init_configuration(config)

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Beside the curves, not as a run of their own as Accelerate does, so that one table shows both."""
        from torch.utils.tensorboard.summary import hparams

        assert self.writer.file_writer is not None
        for summary in hparams(values, dict.fromkeys(("valid/loss", "valid/perplexity", "train/loss"), 0.0)):
            self.writer.file_writer.add_summary(summary)


class _WandB(WandBTracker):
    """A run of W&B. Rows that a resumed run repeats are those it has; it leaves them out."""

    def begin(self, folder: RunFolder, step: int, config: dict[str, Any]) -> None:
        run_id = _stored_ids(folder).get(self.name)
        names = {"name": _run_name(folder)} if run_id is None else {"id": run_id, "resume": "allow"}
        folder.path.mkdir(parents=True, exist_ok=True)
        self.init_kwargs = {"dir": str(folder.path), **names}
        self.start()
        _store_id(folder, self.name, self.run.id)
        self.run.config.update(config, allow_val_change=True)


class _MLflow(MLflowTracker):
    """A run of MLflow, where MLFLOW_TRACKING_URI points. Its parameters cannot change: they stay those of the start."""

    def begin(self, folder: RunFolder, step: int, config: dict[str, Any]) -> None:
        run_id = _stored_ids(folder).get(self.name)
        self.run_id, self.run_name = run_id, _run_name(folder)
        self.start()
        _store_id(folder, self.name, self.active_run.info.run_id)
        if run_id is None:
            self.store_init_configuration(config)


class _Trackio(TrackioTracker):
    """A run of Trackio, which knows its runs by their names."""

    def begin(self, folder: RunFolder, step: int, config: dict[str, Any]) -> None:
        name = _stored_ids(folder).get(self.name)
        if name is None:
            name = f"{_run_name(folder)}-{time.strftime('%Y%m%d-%H%M%S')}"  # another run may have had the folder
        self.init_kwargs = {"name": name, "resume": "allow", "config": config}
        self.start()
        _store_id(folder, self.name, name)


TRACKERS = {"wandb": _WandB, "mlflow": _MLflow, "trackio": _Trackio}


def _make(name: str, folder: RunFolder, project: str) -> GeneralTracker:
    return _TensorBoard("tensorboard", folder.path) if name == "tensorboard" else TRACKERS[name](project)


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The nested configuration as one level of plain values, which is what trackers take.

    >>> flat({"optim": {"lr": 0.1, "betas": [0.9, 0.98]}, "seed": 0, "threads": None})
    {'optim.lr': 0.1, 'optim.betas': '0.9 0.98', 'seed': 0, 'threads': 'None'}
    """
    values: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            values |= flat(value, f"{prefix}{key}.")
        elif isinstance(value, (bool, int, float, str)):
            values[prefix + key] = value
        else:
            several = isinstance(value, (list, tuple))
            values[prefix + key] = " ".join(map(str, value)) if several else str(value)
    return values


def _run_name(folder: RunFolder) -> str:
    """The name of the run folder; a twin has that of its run too."""
    path = folder.path.resolve()
    return f"{path.parent.name}-twin" if path.name == "twin" else path.name


def _stored_ids(folder: RunFolder) -> dict[str, str]:
    try:
        ids = json.loads(_ids_path(folder).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return ids if isinstance(ids, dict) else {}


def _store_id(folder: RunFolder, name: str, run_id: str) -> None:
    write_json(_ids_path(folder), {**_stored_ids(folder), name: run_id})


def _ids_path(folder: RunFolder) -> Path:
    return folder.path / "trackers.json"
