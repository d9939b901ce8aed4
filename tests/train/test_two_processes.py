"""Two processes of a job do what one does: the same losses, evaluations and checkpoints, and one end."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import small_corpus
from two_processes import CASES, configuration, sequences, trainer

from equilibria.solution import UserError
from equilibria.train.distributed import Ranks
from equilibria.train.run_folder import RunFolder, read_metrics

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="launches with torchrun"),
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="PyTorch was built without gloo"),
]
WORKER = Path(__file__).resolve().parents[1] / "two_processes.py"
SMALL = """
    --vocab-size 300 --d-model 16 --d-inner 32 --n-head 2 --mem-len 8 --batch-size 4 --length 8 --eval-batch-size 4
    --max-evals 6 --backward-max-evals 4 --no-twin --steps 100000 --eval-every 50000 --log-every 1 --threads 1
"""
OPTIONS = SMALL.split()


TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")
# What it needs to start more than one process on a CPU; on GPUs it would find them by itself.
ACCELERATE = (
    "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--dynamo_backend", "no",
    "--mixed_precision", "bf16",
)  # fmt: skip


def launch(*argv: str | Path, launcher: tuple[str, ...] = TORCHRUN) -> subprocess.CompletedProcess[str]:
    """Two processes of the worker."""
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error"}
    command = [sys.executable, "-m", *launcher, WORKER, *argv]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)


def losses(folder: Path) -> list[float]:
    return [row["train/loss"] for row in read_metrics(folder / "metrics.jsonl") if "train/loss" in row]


def valid(folder: Path) -> list[float]:
    return [row["valid/loss"] for row in read_metrics(folder / "metrics.jsonl") if "valid/loss" in row]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one process and of two, side by side."""
    folder = tmp_path_factory.mktemp("two")
    for name, (config, corpus) in CASES.items():
        trainer(config, corpus(), folder / f"one-{name}").run()
    for parallel in ("ddp", "fsdp"):
        begun = folder / f"from-1-{parallel}"
        shutil.copytree(folder / "one-plain", begun)
        shutil.rmtree(RunFolder(begun).checkpoints.path(50))
    done = launch("compare", folder)
    assert done.returncode == 0, done.stderr[-6000:]
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("case", CASES)
def test_loss_curve_is_that_of_one_process(folder: Path, case: str, parallel: str):
    one, two = folder / f"one-{case}", folder / f"{parallel}-{case}"
    assert len(losses(one)) == CASES[case][0].optim.steps
    assert losses(two) == pytest.approx(losses(one), abs=1e-5, rel=0)
    assert valid(two) == pytest.approx(valid(one), abs=1e-5, rel=0)
    assert losses(one)[-1] < losses(one)[0]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_resumed_on_another_number_of_processes(folder: Path, parallel: str):
    """The second half of a run on two from the checkpoint of one, and on one from the checkpoint of two."""
    whole = losses(folder / "one-plain")
    assert losses(folder / f"from-1-{parallel}") == pytest.approx(whole, abs=1e-5, rel=0)
    copy = folder / f"from-2-{parallel}"
    shutil.copytree(folder / f"{parallel}-plain", copy)
    shutil.rmtree(RunFolder(copy).checkpoints.path(50))
    resumed = trainer(CASES["plain"][0], small_corpus(), copy)
    assert resumed.state.step == 25
    assert resumed.reader.memory is not None
    assert len(resumed.reader.memory[0]) == 4
    resumed.run()
    assert losses(copy) == pytest.approx(whole, abs=1e-5, rel=0)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_evaluation_does_not_depend_on_who_reads_which_lane(folder: Path, found: dict[str, Any], parallel: str):
    shutil.copytree(folder / "one-uneven", folder / f"eval-{parallel}")
    one = trainer(CASES["uneven"][0], sequences(), folder / f"eval-{parallel}").evaluate("valid").nll
    for lanes in (1, 2, 3):
        assert found[f"{parallel}-valid-{lanes}"] == pytest.approx(one, abs=1e-6)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_no_process_waits_for_another_inside_a_solve(found: dict[str, Any], parallel: str):
    """Solves of unequal length; what is sent comes before or after all steps of a solve."""
    first, second = found[f"{parallel}-evaluations"]
    assert second > 2 * first
    counts = []
    for seen in found[f"{parallel}-seen"]:
        assert re.search("S", seen)
        assert not re.search("[IS]C+S", seen), seen
        counts.append(seen.count("C"))
    assert counts[0] == counts[1] >= 2


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_not_a_number_on_one_process_is_raised_on_all(found: dict[str, Any], parallel: str):
    assert found[f"{parallel}-nonfinite"] == ["process 1: f became NaN"] * 2


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_not_a_number_in_a_backward_solve_of_one_process_is_raised_on_all(found: dict[str, Any], parallel: str):
    said = set(found[f"{parallel}-nonfinite-backward"])
    assert len(said) == 1
    assert said.pop().startswith("step 1: process 1: the gradient that reaches the fixed point is already inf or NaN")


def text_files(folder: Path) -> Path:
    for name, lines in (("train", 300), ("valid", 30), ("test", 30)):
        (folder / f"{name}.txt").write_text("the cat sees a small house and hears the old dog.\n" * lines)
    return folder


def test_failure_of_one_process_ends_the_job_with_its_message(tmp_path: Path):
    run = tmp_path / "run"
    done = launch("fail", tmp_path, "train", "text", "--data-dir", text_files(tmp_path), "--run-dir", run, *OPTIONS)
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("equilibria: ")]
    assert said == ["equilibria: process 1: this process has had enough"], done.stderr


def test_signal_to_one_process_saves_and_ends_all_cleanly(tmp_path: Path):
    run = tmp_path / "run"
    argv = ("stop", tmp_path, "train", "text", "--data-dir", text_files(tmp_path), "--run-dir", run, *OPTIONS)
    done = launch(*argv, launcher=ACCELERATE)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("stopped; everything is saved. Continue with: ") == 1
    assert RunFolder(run).load_config().precision == "bf16"  # as launched
    assert RunFolder(run).checkpoints.steps() == [6]
    assert len(read_metrics(run / "metrics.jsonl")) == 6


def test_a_batch_that_cannot_be_shared_equally_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="--batch-size is 4; 3 processes cannot share it equally; give a multiple of 3"):
        trainer(configuration(), small_corpus(), tmp_path, Ranks(0, 3))
