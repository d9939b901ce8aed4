"""Commands on a text of one's own: show, train, resume, evaluate and generate; and clearing what was kept."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from equilibria.cli.load import load_run
from equilibria.cli.main import main
from equilibria.data import BytePair, text_corpus
from equilibria.data.published import DATA_SETS
from equilibria.train.run_folder import read_metrics

Failure = Callable[..., str]
END = "<|endoftext|>"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EQUILIBRIA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def lines(text_dir: Path, tmp_path: Path) -> Path:
    """The sentences as documents of one .jsonl file."""
    folder = tmp_path / "lines"
    folder.mkdir()
    sentences = (text_dir / "train.txt").read_text().splitlines()
    (folder / "a.jsonl").write_text("".join(json.dumps({"body": sentence}) + "\n" for sentence in sentences))
    return folder


def test_a_run_needs_the_text_but_not_the_tokenizer_it_was_given(
    lines: Path, tmp_path: Path, small: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "model"
    source.mkdir()
    BytePair.train("the cat sees the dog. " * 9, 270, END).save(source)
    monkeypatch.chdir(tmp_path)
    options = [word for word in small if word not in ("--vocab-size", "300")]
    run = tmp_path / "run"
    argv = ["train", "text", "--data-dir", "lines", "--text-field", "body", "--tokenizer", "model", "--no-twin"]
    assert main([*argv, "--run-dir", str(run), *options]) == 0
    assert "text: out of train: 0.05 of it for valid" in capsys.readouterr().err
    shutil.rmtree(source)
    assert main(["train", "text", "--resume", "--run-dir", str(run), "--steps", "8"]) == 0
    assert read_metrics(run / "metrics.jsonl")[-1]["step"] == 8
    assert main(["eval", str(run)]) == 0
    assert "bits per byte" in capsys.readouterr().out
    assert main(["generate", str(run), "--prompt", "the cat", "--tokens", "5"]) == 0
    assert capsys.readouterr().out.startswith("the cat")
    tokenizer = load_run(run).tokenizer
    assert isinstance(tokenizer, BytePair)
    assert tokenizer.end_of_text == END


def test_a_resumed_run_keeps_how_the_text_is_read(failure: Failure, trained: Path) -> None:
    for option, said in {
        "--valid-share 0.1": "valid_share 0.05 -> 0.1",
        "--text-field body": "text_field text -> body",
        "--max-documents 5": "max_documents None -> 5",
        "--tokenizer gpt2": "tokenizer None -> gpt2",
    }.items():
        message = failure("train", "text", "--resume", "--run-dir", trained, *option.split())
        assert f"a resumed run cannot change {said}" in message


def test_a_data_set_trains(lines: Path, tmp_path: Path, small: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "theirs"))
    rows = [json.loads(line)["body"] for line in (lines / "a.jsonl").read_text().splitlines()]
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict({"text": rows}).save_to_disk(str(tmp_path / "saved"))
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    argv = ["train", "text", "--dataset", "saved", "--run-dir", str(run), *small, "--no-twin"]
    assert main(argv) == 0
    assert json.loads((run / "config.json").read_text())["data"]["text"]["dataset"] == str(tmp_path / "saved")
    monkeypatch.chdir(run)
    assert main(["eval", str(run)]) == 0


def test_show_counts_what_there_is(lines: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["data", "show", "--data-dir", str(lines), "--text-field", "body", "--vocab-size", "300"]
    assert main(argv) == 0
    shown = capsys.readouterr()
    assert "out of train" in shown.err
    train, valid, test = (line.split() for line in shown.out.splitlines()[1:4])
    assert int(train[1]) + int(valid[1]) + int(test[1]) == 300
    assert float(train[4]) == pytest.approx(int(train[2].replace(",", "")) / int(train[3].replace(",", "")), abs=0.01)
    assert f" byte-pair, with {END} between documents" in shown.out
    assert not cache.exists()
    assert main(["data", "show", "--corpus", "copy-memory", "--delay", "3"]) == 0
    assert "vocabulary of 10 words" in capsys.readouterr().out


def test_clear_shows_then_deletes_what_can_be_made_again(
    lines: Path, cache: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["data", "clear"]) == 0
    assert f"there is nothing to delete in {cache}" in capsys.readouterr().out
    (lines / "b.txt").write_text("more")
    for size in (300, 290):
        (lines / "a.jsonl").write_text((lines / "a.jsonl").read_text().replace("body", "text"))
        text_corpus(lines, vocab_size=size, large=0)
    newer, older = sorted((cache / "tokens").iterdir(), key=lambda path: path.name)
    long_ago = time.time() - 10 * 86_400
    os.utime(older, (long_ago, long_ago))
    (cache / "downloads").mkdir()
    archive = next(iter(DATA_SETS.values())).archive
    others = [cache / "downloads" / "mine.zip", cache / "data" / "mine" / "file", cache / "tokens" / "notes" / "file"]
    for path in (*others, cache / "downloads" / archive, cache / "data" / "enwik8" / "enwik8"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("content")
    assert main(["data", "clear", "--unused-days", "5"]) == 0
    shown = capsys.readouterr().out
    assert str(older) in shown
    assert "unused for 10 days" in shown
    assert str(newer) not in shown
    assert "to delete it, add --yes" in shown
    assert older.is_dir()
    assert main(["data", "clear", "--unused-days", "5", "--yes"]) == 0
    assert not older.exists()
    assert newer.exists()
    assert main(["data", "clear", "--yes"]) == 0
    assert not newer.exists()
    assert not (cache / "downloads" / archive).exists()
    assert (cache / "data" / "enwik8").is_dir()
    assert main(["data", "clear", "--data-sets", "--yes"]) == 0
    assert not (cache / "data" / "enwik8").exists()
    assert all(path.is_file() for path in others), "what is not ours stays"


def test_a_cache_that_cannot_be_written_is_not_called_full(
    failure: Failure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EQUILIBRIA_CACHE", str(tmp_path / "file" / "cache"))
    message = failure("data", "get", "enwik8")
    assert "cannot write" in message
    assert "set the environment variable EQUILIBRIA_CACHE to a folder that can be written to" in message
    assert "free some space" not in message


def test_a_wrong_path_of_a_tokenizer_is_one_line(failure: Failure, lines: Path, tmp_path: Path) -> None:
    argv = ["train", "text", "--data-dir", lines, "--text-field", "body", "--run-dir", tmp_path / "run"]
    assert "there is no tokenizer ./absent; name a tokenizer.json" in failure(*argv, "--tokenizer", "./absent")
    assert "leave --vocab-size out, or --tokenizer" in failure(*argv, "--tokenizer", "./absent", "--vocab-size", "300")
    assert "its fields are body: name one with --text-field" in failure("data", "show", "--data-dir", lines)
