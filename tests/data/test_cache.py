from __future__ import annotations

import itertools
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from equilibria.data import Vocabulary, WordStyle, cache, word_corpus, word_ids
from equilibria.data.cache import cache_folder, new_folder, numbered_words
from equilibria.data.word_ids import text_chunks
from equilibria.solution import UserError

STYLES = [WordStyle(), WordStyle(counted="all", lower_case=True), WordStyle(counted="all", end_of_line=False)]


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EQUILIBRIA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "words"


def write(folder: Path, *texts: str) -> list[Path]:
    paths = [folder / name for name in ("train", "valid", "test")]
    for path, text in zip(paths, texts, strict=True):
        path.write_text(text, encoding="utf-8", newline="\n")
    return paths


words = st.sampled_from(["a", "b", "B", "É", "é", "<eos>", "<unk>", "c\u2028d", "\t", "x\r"])
texts = st.lists(st.lists(words, max_size=5).map(" ".join), min_size=1, max_size=8).map("\n".join)


@pytest.mark.parametrize("style", STYLES)
@given(texts=st.tuples(texts, texts, texts), size=st.integers(1, 30))
def test_one_pass_gives_the_vocabulary_that_counting_gives(
    style: WordStyle, texts: tuple[str, str, str], size: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Chunks of any size, in memory and in the cache; every word is in train, and every file has a word."""
    train, *held_out = (f"{text}\nz" for text in texts)
    train += " a b B É é <eos> <unk> c d x\n"
    folder = tmp_path_factory.mktemp("words")
    paths = write(folder, train, *held_out)
    lines = [part.removesuffix("\n").split("\n") for part in (train, *held_out)]
    counted = lines[0] if style.counted == "train" else list(itertools.chain(*lines))
    expected = Vocabulary.build(counted, end_of_line=style.end_of_line, lower_case=style.lower_case)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EQUILIBRIA_CACHE", str(folder / "cache"))
        patch.setattr(word_ids, "CHUNK", 4 * size)
        patch.setattr(word_ids.text_chunks, "__defaults__", (size,))
        for large in (0, 0, 1 << 30):  # made, read again, and in memory
            tokens, vocabulary = numbered_words(paths, style, large=large)
            assert vocabulary.words == expected.words
            assert (vocabulary.end_of_line, vocabulary.lower_case) == (style.end_of_line, style.lower_case)
            assert [part.tolist() for part in tokens] == [expected.encode_lines(part).tolist() for part in lines]
            assert all(part.dtype == (torch.int64 if large else torch.int32) for part in tokens)


def test_a_kept_text_is_not_read_again_and_a_changed_one_is(cached: Path, tmp_path: Path) -> None:
    paths = write(tmp_path, "a b b\n", "a\n", "b\n")
    before = word_corpus("x", paths, large=0)
    (kept,) = cached.iterdir()
    made = {path.name: path.stat().st_mtime_ns for path in kept.iterdir()}
    stamp = paths[0].stat()
    again = word_corpus("x", paths, large=0)
    assert torch.equal(before.train.tokens, again.train.tokens)
    assert {path.name: path.stat().st_mtime_ns for path in kept.iterdir()} == made
    paths[0].write_text("b a a\n")  # the same size, and the same time of change
    os.utime(paths[0], ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    changed = word_corpus("x", paths, large=0)
    assert isinstance(changed.tokenizer, Vocabulary)
    assert changed.tokenizer.words == ["<eos>", "a", "b"]
    word_corpus("x", paths, WordStyle(counted="all"), large=0)
    assert len(list(cached.iterdir())) == 3


def test_the_text_may_move_and_its_folder_be_closed_to_writing(cached: Path, tmp_path: Path) -> None:
    folder = tmp_path / "closed"
    folder.mkdir()
    paths = write(folder, "a b b\n", "a\n", "b\n")
    folder.chmod(0o500)
    try:
        first = word_corpus("x", paths, large=0)
    finally:
        folder.chmod(0o700)
    assert {path.name for path in folder.iterdir()} == {"train", "valid", "test"}
    folder.rename(tmp_path / "moved")
    moved = word_corpus("x", [tmp_path / "moved" / path.name for path in paths], large=0)
    assert torch.equal(first.train.tokens, moved.train.tokens)
    assert len(list(cached.iterdir())) == 1


def test_writing_into_the_tokens_does_not_reach_the_cache(cached: Path, tmp_path: Path) -> None:
    paths = write(tmp_path, "a b b\n", "a\n", "b\n")
    corpus = word_corpus("x", paths, large=0)
    kept = corpus.train.tokens.clone()
    corpus.train.tokens.zero_()
    assert torch.equal(word_corpus("x", paths, large=0).train.tokens, kept)


def test_what_fails_leaves_nothing(cached: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'new' of .*test is not among the words of the train split"):
        word_corpus("x", write(tmp_path, "a\n", "a\n", "new\n"), large=0)
    assert list(cached.iterdir()) == []


def flip(content: bytes) -> bytes:
    return bytes([content[0] ^ 1]) + content[1:]


@pytest.mark.parametrize("damage", [flip, lambda content: content[:-1], lambda content: b"1234", None])
@pytest.mark.parametrize("name", ["train.int32", "valid.int32", "test.int32", "tokenizer.json", "sha256.json"])
def test_what_is_damaged_is_made_again(
    name: str, damage: Callable[[bytes], bytes] | None, cached: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also an id that became another one, which leaves the size of the file as it was."""
    paths = write(tmp_path, "a b b c\n", "a\n", "b\n")
    word_corpus("x", paths, large=0)
    (kept,) = cached.iterdir()
    content = (kept / name).read_bytes()
    if damage is None:
        (kept / name).unlink()
    else:
        (kept / name).write_bytes(damage(content))
    capsys.readouterr()
    for line in (f"the kept text in {kept} is damaged; its words are numbered again\n", ""):
        corpus = word_corpus("x", paths, large=0)
        assert capsys.readouterr().err == line
        assert corpus.tokenizer.decode(corpus.train.tokens.tolist()) == "a b b c\n"
    assert (kept / name).read_bytes() == content
    assert [path.name for path in cached.iterdir()] == [kept.name]


def test_all_is_on_the_disk_before_a_folder_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    monkeypatch.setattr(cache, "sync", lambda path: synced.append(path.name if target.is_dir() else f"before: {path.name}"))
    target = tmp_path / "target"
    with new_folder(target) as scratch:
        (scratch / "deep").mkdir()
        (scratch / "deep" / "file").write_text("content")
    assert sorted(synced[:-2]) == ["before: deep", "before: file"]
    assert synced[-2:] == [f"before: {scratch.name}", tmp_path.name]


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EQUILIBRIA_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cannot write to .*set the environment variable EQUILIBRIA_CACHE"):
        word_corpus("x", write(tmp_path, "a\n", "a\n", "a\n"), large=0)


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("EQUILIBRIA_CACHE", "")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == tmp_path / ".cache" / "equilibria"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder() == tmp_path / ".cache" / "equilibria"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "equilibria"
    monkeypatch.setenv("EQUILIBRIA_CACHE", "~/own")
    assert cache_folder() == tmp_path / "own"


def test_a_folder_is_whole_or_not_there(tmp_path: Path) -> None:
    def fill(text: str) -> None:
        with new_folder(tmp_path / "deep" / "target") as scratch:
            (scratch / "file").write_text(text)
            if text == "bad":
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fill("bad")
    assert list((tmp_path / "deep").iterdir()) == []
    fill("first")
    fill("second")  # as a second process would that was slower
    assert (tmp_path / "deep" / "target" / "file").read_text() == "first"
    with new_folder(tmp_path / "deep" / "target", replace=True) as scratch:
        (scratch / "file").write_text("third")
    assert (tmp_path / "deep" / "target" / "file").read_text() == "third"
    assert len(list((tmp_path / "deep").iterdir())) == 1


def test_what_a_killed_process_left_goes_after_a_day(tmp_path: Path) -> None:
    for name, age in [(".target-old", 2 * 86_400), (".target-new", 60), (".other-old", 2 * 86_400)]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_text("half")
        os.utime(tmp_path / name, times=(time.time(), time.time() - age))
    with new_folder(tmp_path / "target"):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {"target", ".target-new", ".other-old"}


def test_misuse() -> None:
    with pytest.raises(ValueError, match="counted must be 'train' or 'all'"):
        WordStyle(counted="valid")  # pyright: ignore[reportArgumentType]


def test_a_line_that_is_not_utf8_is_counted_over_chunks(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"one\n" * 50 + b"caf\xe9\n")
    with pytest.raises(UserError, match=r"line 51 of .*text is not UTF-8"):
        list(text_chunks(tmp_path / "text", 10))


MEASURE = """
import sys
from pathlib import Path
from equilibria.data import cache, word_corpus, word_ids

def peak():  # of this process; ru_maxrss would also count what its parent had before it started
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

word_ids.CHUNK = 1 << 18
word_ids.text_chunks.__defaults__ = (1 << 18,)
for train in sys.argv[3:]:
    tokens, vocabulary = cache.numbered_words([Path(train), *map(Path, sys.argv[1:3])], word_ids.WordStyle(), large=0)
    assert vocabulary.size == 20_001
    print(1024 * peak())
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="the peak of memory is read from /proc")
def test_memory_does_not_grow_with_the_text(cached: Path, tmp_path: Path) -> None:
    """After 3 MB of text, 24 MB take less memory more than a third of the difference; the ids alone are half of it."""
    draw = random.Random(0)
    vocabulary = [f"word{i}" for i in range(20_000)]
    piece = " ".join(vocabulary) + "\n" + "".join(" ".join(draw.choices(vocabulary, k=50)) + "\n" for _ in range(6000))
    first, *held_out = write(tmp_path, piece, "word1\n", "word2\n")
    larger = tmp_path / "larger"
    larger.write_text(piece * 8)
    command = [sys.executable, "-c", MEASURE, *map(str, held_out), str(first), str(larger)]
    run = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ), check=True)
    before, after = map(int, run.stdout.split())
    assert after - before < 7 * len(piece) / 3
    assert len(list(cached.iterdir())) == 2
