from __future__ import annotations

import dataclasses
import hashlib
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from equilibria.cli.main import main
from equilibria.data import published
from equilibria.data.published import DATA_SETS, PENN_TREEBANK_CHAR

Failure = Callable[..., str]
CONTENT = {"train": "a b _ c \n", "valid": "a _ b \n", "test": "b c \n"}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EQUILIBRIA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An archive of a few letters that stands for that of the Penn Treebank's characters."""
    path = tmp_path / "letters.zip"
    with zipfile.ZipFile(path, "w") as file:
        for split, content in CONTENT.items():
            file.writestr(f"simple-examples/data/ptb.char.{split}.txt", content)
    small = dataclasses.replace(
        PENN_TREEBANK_CHAR,
        checksum=f"md5:{hashlib.md5(path.read_bytes()).hexdigest()}",
        counts=(5, 4, 3),
        vocabulary=5,
        url="http://127.0.0.1:9/letters.zip",  # where nothing listens
    )
    monkeypatch.setitem(published.DATA_SETS, "penn-treebank-char", small)
    return path


def test_list_shows_every_data_set_and_which_are_here(
    archive: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "list"]) == 0
    before = capsys.readouterr().out
    assert all(name in before for name in DATA_SETS)
    assert "103,227,021 / 217,646 / 245,569 tokens" in before
    assert f"cache: {cache}" in before
    assert "(here)" not in before
    assert main(["data", "get", "penn-treebank-char", "--from", str(archive)]) == 0
    capsys.readouterr()
    assert main(["data", "list"]) == 0
    assert "character level (here)" in capsys.readouterr().out


def test_get_prints_the_folder_and_verify_what_it_found(
    archive: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = cache / "data" / "penn-treebank-char"
    for _ in range(2):
        assert main(["data", "get", "penn-treebank-char", "--from", str(archive)]) == 0
        assert capsys.readouterr().out == f"{folder}\n"
    assert main(["data", "verify", "penn-treebank-char"]) == 0
    assert "ptb.char.test.txt: 5 bytes (no checksum is known)\n" in (out := capsys.readouterr().out)
    assert out.endswith("penn-treebank-char: 5 / 4 / 3 tokens, 5 symbols, as published\n")
    assert main(["data", "verify", "penn-treebank-char", "--data-dir", str(folder)]) == 0


def test_help_names_the_cache(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["data"], ["data", "--help"]):
        assert main(argv) == 0
        assert f"The cache is {cache};" in capsys.readouterr().out
    for action in ("get", "verify"):
        with pytest.raises(SystemExit):
            main(["data", action, "--help"])
        assert "equilibria data list" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("data fetch enwik8", "equilibria data cannot fetch; choose list, get, verify, show or clear"),
        ("data list enwik8", "data list takes no enwik8"),
        ("data get", "missing: NAME"),
        ("data get ptb", "there is no data set 'ptb'; choose wikitext-103, wikitext-2,"),
        ("data get enwik8 --form x", "did you mean --from?"),
        ("data get enwik8 --from absent", "there is no file absent; give the file that was fetched from http://"),
        ("data verify enwik8", "enwik8 is not in"),
        ("data verify enwik8 --data-dir absent", "absent does not exist"),
        ("dota", "did you mean data?"),
    ],
)
def test_a_mistake_is_one_line(failure: Failure, argv: str, said: str) -> None:
    assert said in failure(*argv.split())


def test_without_a_network_one_line_says_what_to_do(
    failure: Failure, archive: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("equilibria.data.download.ATTEMPTS", 1)
    message = failure("data", "get", "penn-treebank-char")
    assert "fetch http://127.0.0.1:9/letters.zip by other means" in message
    assert f"put it into {cache / 'downloads'}" in message


def test_a_corpus_that_is_not_here_says_how_to_get_it(failure: Failure, tmp_path: Path) -> None:
    message = failure("train", "wikitext-2-transformer", "--run-dir", tmp_path / "run")
    assert "fetch it with: equilibria data get wikitext-2, or name with --data-dir a folder" in message
