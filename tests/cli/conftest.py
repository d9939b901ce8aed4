from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from equilibria.cli.main import main

OPTIONS = """
    --vocab-size 300 --d-model 16 --d-inner 32 --n-head 2 --mem-len 8 --batch-size 4 --length 8 --eval-batch-size 4
    --max-evals 6 --backward-max-evals 4 --twin-depth 2 --pretrain-depth 2 --pretrain-steps 2 --warmup-steps 2
    --steps 6 --eval-every 3 --log-every 1 --sample-tokens 12 --threads 1
"""
SMALL = OPTIONS.split()


def write_text(folder: Path, sizes: tuple[int, int, int] = (300, 30, 30)) -> Path:
    """Three splits of generated sentences."""
    draw = random.Random(7)
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in zip(("train", "valid", "test"), sizes, strict=True):
        words = ("the", "a", "cat", "dog", "sees", "hears", "small", "old", "house", "tree")
        text = "".join(" ".join(draw.choices(words, k=6)) + ".\n" for _ in range(lines))
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def text_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="session")
def trained(text_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small finished run, with its twin. Tests must not change it."""
    run = tmp_path_factory.mktemp("runs") / "small"
    assert main(["train", "text", "--data-dir", str(text_dir), "--run-dir", str(run), *SMALL]) == 0
    return run


@pytest.fixture
def small() -> list[str]:
    """Options of a run that takes seconds."""
    return list(SMALL)


@pytest.fixture
def failure(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command line that must fail with this exit code, and returns its one line on standard error."""

    def run(*argv: str | Path, code: int = 2) -> str:
        capsys.readouterr()
        assert main([str(part) for part in argv]) == code
        lines = capsys.readouterr().err.splitlines()
        message = [line for line in lines if line.startswith("equilibria: ")]
        assert len(message) == 1
        assert lines[-1] == message[0]
        assert "Traceback" not in "".join(lines)
        return message[0]

    return run
