from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from equilibria.recipes import RECIPES
from equilibria.solution import UserError
from equilibria.train.run_folder import MetricsLog, RunFolder, create_run, newest_run, open_run, read_metrics
from equilibria.train.typed import options_of


def test_new_runs_are_numbered(tmp_path: Path):
    names = [create_run("text", None, tmp_path).path.name for _ in range(3)]
    assert names == ["text", "text-2", "text-3"]


def test_newest_run_has_the_highest_number_and_a_configuration(tmp_path: Path):
    for number in range(1, 12):
        folder = create_run("text", None, tmp_path)
        if number != 11:
            folder.store_config(RECIPES["text"]())
    create_run("text-mining", None, tmp_path).store_config(dataclasses.replace(RECIPES["text"](), recipe="text-mining"))
    assert newest_run("text", tmp_path).path.name == "text-10"
    with pytest.raises(UserError, match=r"there is no run of quickstart in .*; leave out --resume"):
        newest_run("quickstart", tmp_path)


def test_a_given_folder_must_be_free(tmp_path: Path):
    assert create_run("text", tmp_path / "deep" / "run").path.is_dir()
    (tmp_path / "deep" / "run" / "file").touch()
    for taken in ("deep/run", "deep/run/file"):
        with pytest.raises(UserError, match="exists already; add --resume"):
            create_run("text", tmp_path / taken)


def test_open_run_needs_a_run(tmp_path: Path):
    with pytest.raises(UserError, match="there is no run folder"):
        open_run(tmp_path / "absent")
    with pytest.raises(UserError, match=r"is not a run: it has no config\.json"):
        open_run(tmp_path)
    config = RECIPES["text"]()
    RunFolder(tmp_path).store_config(config)
    assert open_run(tmp_path).load_config() == config


def test_metrics_are_cut_back_to_the_checkpoint(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    log = MetricsLog(path, step=0)
    for step in range(1, 6):
        log.append({"step": step, "loss": step / 3})
    log.close()
    with path.open("a") as file:
        file.write('{"step": 6, "lo')  # a kill in the middle of a line
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3, 4, 5]
    log = MetricsLog(path, step=3)
    log.append({"step": 4, "loss": 0.5})
    log.close()
    assert read_metrics(path) == [{"step": step, "loss": step / 3} for step in (1, 2, 3)] + [{"step": 4, "loss": 0.5}]


@pytest.mark.parametrize("damage", [b'{"step": 2, "lo', b"12", b'{"loss": 1}', b'{"step": null}', b"\xff\xfe", b"\0\0\0"])
def test_a_damaged_line_takes_no_other_with_it(tmp_path: Path, damage: bytes):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + damage + b'\n{"step": 2}\n')
    MetricsLog(path, step=2).close()
    assert read_metrics(path) == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize("damage", [b"\xff\xfe", b'equilibria train text "half\n'])
def test_a_damaged_command_is_as_none(tmp_path: Path, damage: bytes):
    (tmp_path / "command.txt").write_bytes(damage)
    assert options_of(tmp_path / "command.txt") == []


def test_a_folder_is_held_by_one_process_at_a_time(tmp_path: Path):
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    with folder.held(), pytest.raises(UserError, match=r"another process trains in .*run; wait until it has ended"):
        folder.held().__enter__()
    assert list(folder.path.iterdir()) == []
    with folder.held():
        pass
