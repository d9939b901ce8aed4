"""The last few checkpoints of a run, and what happens where some are damaged."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from small_runs import CONFIG, Make, losses, weights

from equilibria.cli.main import main
from equilibria.solution import UserError
from equilibria.train.checkpoint import load_state, verify
from equilibria.train.checkpoints import Checkpoints
from equilibria.train.loop import Trainer
from equilibria.train.run_folder import RunFolder, read_metrics

OFTEN = dataclasses.replace(CONFIG, checkpoint_every=2)


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run with checkpoints of steps 10, 12 and 14, of which 14 is the best. Tests must not change it."""
    from small_runs import small_corpus

    from equilibria.recipes.build import build_model
    from equilibria.train.interrupt import StopRequest

    folder, corpus = RunFolder(tmp_path_factory.mktemp("finished") / "run"), small_corpus()
    torch.manual_seed(OFTEN.seed)
    trainer = Trainer(build_model(OFTEN, corpus.tokenizer.size), corpus, OFTEN, folder, stop=StopRequest())
    folder.store_config(OFTEN)
    trainer.run()
    return folder


@pytest.fixture
def copy(finished: RunFolder, tmp_path: Path) -> RunFolder:
    return RunFolder(shutil.copytree(finished.path, tmp_path / "run"))


def test_the_last_few_are_kept(finished: RunFolder):
    assert finished.checkpoints.steps() == [10, 12, 14]
    assert all(load_state(finished.checkpoints.path(step))["step"] == step for step in (10, 12, 14))


def test_checksums_are_those_of_sha256sum(finished: RunFolder):
    if shutil.which("sha256sum") is None:
        pytest.skip("no sha256sum here")
    for folder in (finished.best, finished.checkpoints.path(14)):
        subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=folder, check=True, capture_output=True)


@pytest.mark.parametrize("name", ["model.safetensors", "position.safetensors", "state.json", "SHA256SUMS"])
def test_a_damaged_one_is_passed_over(
    make: Make, copy: RunFolder, finished: RunFolder, name: str, capsys: pytest.CaptureFixture[str]
):
    damage(copy.checkpoints.path(14) / name)
    damage(copy.checkpoints.path(12) / "optimizer.safetensors")
    resumed = make(OFTEN)
    said = capsys.readouterr().err
    assert "step-00000014" in said
    assert "optimizer.safetensors is damaged: its content is not what was written" in said
    assert said.endswith("; going back to the checkpoint of step 10\n")
    assert resumed.state.step == 10
    resumed.recorder.open(print)
    resumed.recorder.close()
    assert max(row["step"] for row in read_metrics(copy.metrics)) == 10, "the metrics go back as well"
    resumed.run()
    whole = make(OFTEN, name="whole")
    whole.run()
    assert losses(resumed) == losses(whole)
    mine, others = weights(resumed), weights(whole)
    assert all(torch.equal(mine[key], others[key]) for key in others)
    assert copy.checkpoints.steps() == [10, 12, 14]
    for step in (10, 12, 14):
        verify(copy.checkpoints.path(step))


def test_later_ones_go_with_the_next(make: Make, copy: RunFolder):
    """A run that went back must not be resumed from where it had been before."""
    shutil.copytree(copy.checkpoints.path(14), copy.checkpoints.path(99))
    damage(copy.checkpoints.path(99) / "state.json")
    damage(copy.checkpoints.path(14) / "state.json")
    resumed = make(OFTEN, last_step=13)
    assert resumed.state.step == 12
    resumed.run()
    assert copy.checkpoints.steps() == [10, 12, 13]


def test_all_damaged(make: Make, copy: RunFolder):
    for step in copy.checkpoints.steps():
        damage(copy.checkpoints.path(step) / "optimizer.safetensors")
    with pytest.raises(UserError, match=r"all 3 checkpoints in .* cannot be used: .*; restore one of these") as caught:
        make(OFTEN)
    assert "\n" not in str(caught.value)


def test_damaged_best_weights_are_replaced(copy: RunFolder, capsys: pytest.CaptureFixture[str]):
    assert copy.weights == copy.best
    damage(copy.best / "model.safetensors")
    assert copy.weights == copy.checkpoints.path(14)
    said = capsys.readouterr().err
    assert "model.safetensors is damaged" in said
    assert said.rstrip().endswith(f"using the weights of {copy.checkpoints.path(14)} instead")
    damage(copy.checkpoints.path(14) / "model.safetensors")
    assert copy.weights == copy.checkpoints.path(12)
    shutil.rmtree(copy.checkpoints.folder)
    with pytest.raises(UserError, match="is damaged"):
        _ = copy.weights


def test_the_weights_of_the_best_step_are_preferred(copy: RunFolder):
    """The very same weights, where that checkpoint is still kept."""
    checkpoints = copy.checkpoints
    state = load_state(checkpoints.path(14)) | {"best_step": 10}
    checkpoints.save(14, state, keep=3)
    damage(copy.best / "model.safetensors")
    assert copy.weights == checkpoints.path(10)


def test_readers_leave_the_scratch_of_a_writer_alone(copy: RunFolder):
    scratch = [copy.path / ".best.new", copy.checkpoints.folder / ".step-00000016.new"]
    for folder in scratch:
        folder.mkdir()
    copy.best.rename(copy.path / ".best.old")  # between the two renames of a writer
    assert verify(copy.weights) is None
    assert copy.checkpoints.newest(load_state)["step"] == 14
    assert all(folder.is_dir() for folder in scratch)
    copy.checkpoints.save(16, {"step": 16}, keep=3)
    assert copy.checkpoints.steps() == [12, 14, 16]
    assert not list(copy.checkpoints.folder.glob(".*"))


def test_no_checkpoint(tmp_path: Path):
    with pytest.raises(UserError, match="there is no checkpoint in"):
        Checkpoints(tmp_path / "none").newest(load_state)
    (tmp_path / "checkpoint").mkdir()
    with pytest.raises(UserError, match="written by an earlier version"):
        RunFolder(tmp_path).has_checkpoint()


def test_help_names_the_options(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["train", "text", "--help"])
    said = capsys.readouterr().out
    assert all(option in said for option in ("--keep-checkpoints", "--on-nonfinite", "{stop,roll-back}", "--max-rollbacks"))
