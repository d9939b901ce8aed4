"""Ctrl-C and SIGTERM, sent to a real process."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from equilibria.cli.main import main
from equilibria.train.run_folder import RunFolder, read_metrics

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="sends POSIX signals")


Command = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def command() -> Iterator[Command]:
    """Starts `equilibria` with these arguments, to which ctrl-C means something; what is left of it is ended.

    What a shell starts in the background is deaf to SIGINT, and so is all that it starts, the tests as well.
    """
    started = []

    def start(*argv: str) -> subprocess.Popen[str]:
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            process = subprocess.Popen(
                [sys.executable, "-W", "error", "-m", "equilibria", *argv],
                stderr=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        finally:
            signal.signal(signal.SIGINT, before)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def endless(run: Path, text_dir: Path, small: list[str]) -> list[str]:
    argv = ["train", "text", "--data-dir", str(text_dir), "--run-dir", str(run), *small, "--steps", "100000"]
    return [*argv, "--eval-every", "50000"]


def wait_for(process: subprocess.Popen[str], ready: Callable[[], bool]) -> None:
    for _ in range(1200):
        if ready():
            return
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    raise AssertionError("training did not begin within a minute")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(
    number: signal.Signals, command: Command, text_dir: Path, small: list[str], tmp_path: Path
):
    run = tmp_path / "a run"
    process = command(*endless(run, text_dir, small))
    wait_for(process, lambda: len(read_metrics(run / "metrics.jsonl")) >= 3)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "Traceback" not in err
    assert "stopping after this step" in err
    assert err.splitlines()[-1] == (
        f"stopped; everything is saved. Continue with: equilibria train text --resume --run-dir '{run}'"
    )
    assert out == ""
    (step,) = RunFolder(run).checkpoints.steps()
    assert step >= 3
    assert [row["step"] for row in read_metrics(run / "metrics.jsonl")] == list(range(1, step + 1))
    assert main(["train", "text", "--resume", "--run-dir", str(run), "--steps", str(step + 1), "--no-twin"]) == 0
    assert json.loads((run / "summary.json").read_text())["model"]["steps"] == step + 1


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="cannot see what another process has loaded")
def test_ctrl_c_while_pytorch_is_loading(command: Command, tmp_path: Path):
    process = command("train", "quickstart", "--run-dir", str(tmp_path / "run"))
    wait_for(process, lambda: "libtorch" in Path(f"/proc/{process.pid}/maps").read_text())
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "equilibria: aborted\n")
    assert not (tmp_path / "run").exists()


def test_second_ctrl_c_aborts(command: Command, text_dir: Path, small: list[str], tmp_path: Path):
    run = tmp_path / "run"
    process = command(*endless(run, text_dir, small), "--accumulate", "1000000", "--trackers", "none")  # a step has no end
    wait_for(process, (run / "metrics.jsonl").is_file)
    spent = psutil.Process(process.pid).cpu_times
    opened = spent().user
    wait_for(process, lambda: spent().user > opened + 1)  # it is under way: all there is to do before is done by then
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    while "stopping after this step" not in process.stderr.readline():  # two signals at once would count as one
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert err.splitlines()[-1] == "equilibria: aborted"
