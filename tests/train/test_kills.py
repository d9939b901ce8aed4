"""Runs that are killed at any moment, or find the disk full: each is readable at once and ends as if nothing had been."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="forks and sends POSIX signals")
WORKER = Path(__file__).with_name("kill_worker.py")
MOUNTS = 'mount -t tmpfs -o size=64m none "$1" && mount -t tmpfs -o size=1m none "$2" && shift 2'


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What every experiment of the worker found, on file systems of their own where the system lets us mount some."""
    folder = tmp_path_factory.mktemp("kills")
    (large := folder / "large").mkdir()
    (small := folder / "small").mkdir()
    worker = [sys.executable, "-W", "error", str(WORKER), str(large)]
    inside = ["unshare", "-rm", "sh", "-ec", f'{MOUNTS} && exec "$@"', "sh", str(large), str(small)]
    can_mount = shutil.which("unshare") and subprocess.run([*inside, "true"], capture_output=True).returncode == 0
    command = [*inside, *worker, str(small)] if can_mount else worker
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def result(results: dict[str, dict[str, Any]], name: str) -> dict[str, Any]:
    assert "error" not in results[name], results[name]["error"]
    return results[name]


def test_killed_at_random_moments(results: dict[str, dict[str, Any]]):
    """Never an unreadable run, never a step lost beyond the last checkpoint, and at the end the very same weights."""
    found = result(results, "killed at random")
    assert found["kills"] >= 30
    assert found["while_saving"] >= 5
    assert found["finished"] >= 2


def test_killed_before_every_operation_on_the_disk(results: dict[str, dict[str, Any]]):
    operations = result(results, "killed at each operation")["operations"]
    assert operations.count("save_file") == 4, "the weights twice, optimizer and position"
    assert operations.count("rename") >= 4
    assert operations.count("fsync") >= 20
    assert operations.count("rmdir") == 2, "the best weights before, and the oldest checkpoint"


def test_no_room_at_any_operation_on_the_disk(results: dict[str, dict[str, Any]]):
    said = result(results, "full at each operation")["said"]
    assert len(said) > 30
    assert all("no room on the disk" in message for message in said)


@pytest.mark.parametrize("name", ["largest file", "full disk"])
def test_no_room(results: dict[str, dict[str, Any]], name: str):
    """One clear line, and the run goes on once there is room."""
    if name not in results:
        pytest.skip("the system lets us mount no small disk")
    *refused, fitted = result(results, name)["said"]
    assert fitted == "", "enough room is enough"
    for message in refused:
        assert "no room on the disk" in message
        assert "free some space; the last checkpoint is that of step 3 in" in message
        assert message.endswith("resume by adding --resume")
    assert any("safetensors" in message for message in refused)
