"""Trackers: what they are sent, how a resumed run goes on with them, and what happens where one fails."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from accelerate import PartialState
from small_runs import CONFIG, Make, with_optim
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from equilibria.solution import UserError
from equilibria.train import trackers
from equilibria.train.advice import RULES, bf16_floor
from equilibria.train.config import RunConfig, to_json
from equilibria.train.interrupt import Interrupted, StopRequest
from equilibria.train.run_folder import RunFolder, read_metrics
from equilibria.train.trackers import Tracked, Trackers, check_trackers


class StopAtOnce(StopRequest):
    """Asks to stop when the sixth step is to be taken; validations, every four steps, go on."""

    def __init__(self) -> None:
        super().__init__()
        self.left = 13  # 4 steps, 8 segments of a validation, 1 step

    def check(self) -> None:
        self.left -= 1
        self.requested = self.left < 0
        super().check()


class Fake:
    """Keeps what it is sent; fails while `broken`."""

    name = "fake"

    def __init__(self) -> None:
        self.broken = False
        self.seen: list[Any] = []

    def note(self, what: Any) -> None:
        if self.broken:
            raise OSError(28, "No space left on device")
        self.seen.append(what)

    def begin(self, step: int, config: dict[str, Any]) -> None:
        self.note(("begin", step))

    def log(self, row: dict[str, float], step: int) -> None:
        self.note(step)

    def finish(self) -> None:
        self.note("finish")


def test_tensorboard_gets_every_row_and_the_hyperparameters_and_goes_on(make: Make):
    config = with_optim(steps=8)
    with pytest.raises(Interrupted):
        make(config, stop=StopAtOnce()).run()
    trainer = make(config)
    assert trainer.state.step == 5
    trainer.run()
    events = EventAccumulator(str(trainer.folder.path / "tensorboard")).Reload()
    rows = read_metrics(trainer.folder.metrics)
    for name in ("train/loss", "train/gradient_norm", "train/memory_bytes", "forward/evaluations", "valid/loss"):
        mine = [(row["step"], row[name]) for row in rows if name in row]
        assert [(event.step, event.value) for event in events.Scalars(name)] == [(s, pytest.approx(v)) for s, v in mine]
    start = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert b"optim.lr" in start
    assert b"solver.max_evals" in start


def test_gradient_norms_and_clipped_steps_are_recorded(make: Make):
    first = []
    for clip, clipped in ((1e9, 0.0), (1e-6, 1.0)):
        trainer = make(with_optim(clip=clip, steps=3), name=f"clip-{clip}")
        trainer.run()
        rows = [row for row in read_metrics(trainer.folder.metrics) if "train/loss" in row]
        assert [row["train/clipped"] for row in rows] == [clipped] * 3
        first.append(rows[0]["train/gradient_norm"])
    assert first[0] == first[1] > 1e-3  # of the same weights, and before clipping


def test_the_manual_names_every_metric_and_every_kind_of_advice(make: Make):
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "watch.md").read_text(encoding="utf-8")
    trainer = make(with_optim(steps=4))
    trainer.run()
    names = {name for row in read_metrics(trainer.folder.metrics) for name in row}
    assert {"train/clipped", "backward/unconverged", "valid/bits_per_byte"} <= names
    assert [name for name in names if f"`{name}`" not in page] == []
    kinds = [rule.__name__.replace("_", " ") for rule in (*RULES, bf16_floor)]
    assert [kind for kind in kinds if f"| {kind} |" not in page] == []


@pytest.mark.parametrize("when", ["begin", "log", "finish"])
def test_a_tracker_that_fails_never_ends_training(make: Make, monkeypatch: pytest.MonkeyPatch, when: str, capsys: Any):
    def broken(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trackers._TensorBoard, when, broken)
    trainer = make(with_optim(steps=6))
    trainer.run()
    assert trainer.state.step == 6
    assert len([row for row in read_metrics(trainer.folder.metrics) if "train/loss" in row]) == 6
    warnings = [line for line in capsys.readouterr().err.splitlines() if "tracker tensorboard failed" in line]
    assert len(warnings) == 1
    assert "No space left on device" in warnings[0]
    assert "metrics.jsonl has everything" in warnings[0]


def test_a_tracker_that_comes_back_gets_what_it_missed():
    fake, said = Fake(), []
    tracked = Tracked(fake, said.append, retry=0.0)
    tracked.do(lambda tracker: tracker.begin(0, {}))
    for step in range(6):
        fake.broken = step in (2, 3, 4)
        tracked.do(lambda tracker, step=step: tracker.log({}, step))
    tracked.finish()
    assert fake.seen == [("begin", 0), 0, 1, 2, 3, 4, 5, "finish"]
    assert len(said) == 1


def test_a_tracker_that_failed_is_left_alone_for_a_while_and_keeps_the_latest(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(trackers, "MOST_WAITING", 4)
    fake, said = Fake(), []
    fake.broken = True
    tracked = Tracked(fake, said.append)
    tracked.do(lambda tracker: tracker.begin(0, {}))
    fake.broken = False
    for step in range(6):
        tracked.do(lambda tracker, step=step: tracker.log({}, step))
    assert fake.seen == []
    tracked.finish()
    assert fake.seen == [("begin", 0), 3, 4, 5, "finish"]


def test_a_missing_package_is_one_sentence_that_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    found = importlib.util.find_spec
    gone = ("wandb", "mlflow")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in gone else found(name))
    check_trackers(["tensorboard"])
    check_trackers(["none"])
    with pytest.raises(UserError, match=r'wandb is not installed; install with: pip install "equilibria\[wandb\]"'):
        check_trackers(["tensorboard", "wandb"])
    with pytest.raises(UserError, match=r'wandb and mlflow are not installed; .* "equilibria\[trackers\]"'):
        check_trackers(["wandb", "mlflow"])


def test_none_goes_with_no_other():
    with pytest.raises(UserError, match="none goes with no other"):
        RunConfig(recipe="text", trackers=("none", "wandb"))


def test_without_trackers_there_are_the_metrics_alone(make: Make):
    trainer = make(RunConfig(**{**vars(with_optim(steps=2)), "trackers": ("none",)}))
    trainer.run()
    assert not (trainer.folder.path / "tensorboard").exists()
    assert len(read_metrics(trainer.folder.metrics)) == 3


def twice(names: list[str], folder: RunFolder) -> list[dict[str, str]]:
    """The ids after a run that was resumed, its trackers sent three rows each time."""
    PartialState()
    ids, said = [], []
    for step in (0, 3):
        several = Trackers(names, folder, project="tests", say=said.append)
        several.open(step=step, config=to_json(CONFIG))
        for now in range(step, step + 3):
            several.log({"train/loss": 10.0 - now}, now)
        several.close()
        ids.append(json.loads((folder.path / "trackers.json").read_text()))
    assert said == []
    return ids


@pytest.mark.filterwarnings("ignore")  # what W&B does inside is not ours
def test_wandb_continues_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    first, second = twice(["wandb"], RunFolder(tmp_path))
    assert first == second
    assert len(list((tmp_path / "wandb").glob(f"offline-run-*-{first['wandb']}"))) >= 1


@pytest.mark.filterwarnings("ignore")  # nor what MLflow does
def test_mlflow_continues_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path}/mlruns")
    before = mlflow.get_tracking_uri()
    try:
        mlflow.set_tracking_uri(f"file:{tmp_path}/mlruns")
        first, second = twice(["mlflow"], RunFolder(tmp_path))
        assert first == second
        client = mlflow.MlflowClient()
        history = client.get_metric_history(first["mlflow"], "train/loss")
        assert [(point.step, point.value) for point in history] == [(step, 10.0 - step) for step in range(6)]
        run = client.get_run(first["mlflow"])
        assert run.data.params["optim.lr"] == str(CONFIG.optim.lr)
        assert run.info.status == "FINISHED"
    finally:
        mlflow.set_tracking_uri(before)


@pytest.mark.filterwarnings("ignore")  # nor what Trackio does
def test_trackio_continues_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    first, second = twice(["trackio"], RunFolder(tmp_path))
    assert first == second
