from __future__ import annotations

import math
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch

from equilibria.data import Corpus, TextOptions, Vocabulary, load_corpus, published_corpus, text_corpus
from equilibria.solution import UserError

WIKI = {"train.txt": "wiki.train.tokens", "valid.txt": "wiki.valid.tokens", "test.txt": "wiki.test.tokens"}


@pytest.fixture
def tiny_wikitext_dir(tiny_corpus_dir: Path) -> Path:
    """The generated text under the names of WikiText-2."""
    for name, wiki_name in WIKI.items():
        (tiny_corpus_dir / name).rename(tiny_corpus_dir / wiki_name)
    return tiny_corpus_dir


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EQUILIBRIA_CACHE", str(tmp_path / "cache"))


def counts(corpus: Corpus) -> tuple[int, int, int, int]:
    return len(corpus.train.tokens), len(corpus.valid.tokens), len(corpus.test.tokens), corpus.tokenizer.size


def test_wikitext2_has_its_published_counts(shared_data: Path) -> None:
    corpus = published_corpus("wikitext-2", shared_data)
    assert counts(corpus) == (2_088_628, 217_646, 245_569, 33_278)
    for split, name in [(corpus.train, "train"), (corpus.valid, "valid"), (corpus.test, "test")]:
        path = shared_data / "wikitext-2" / f"wiki.{name}.tokens"
        text = path.read_text(encoding="utf-8")
        assert split.text_bytes == len(text.encode())
        assert (split.tokens == 0).sum() == text.count("\n")
    assert corpus.test_text is not None
    test_words = corpus.test_text.replace("\n", " <eos> ").split()
    assert isinstance(corpus.tokenizer, Vocabulary)
    assert [corpus.tokenizer.words[i] for i in corpus.test.tokens] == test_words
    assert corpus.tokenizer.words[:4] == ["<eos>", "the", ",", "."]


def test_penn_treebank_has_its_published_counts(shared_data: Path) -> None:
    corpus = load_corpus("penn-treebank", shared_data / "penn-treebank")
    assert corpus.name == "penn-treebank"
    assert counts(corpus) == (929_589, 73_760, 82_430, 10_000)
    assert torch.equal(published_corpus("penn-treebank", shared_data).test.tokens, corpus.test.tokens)


def test_word_level_corpus_stands_for_the_words_of_its_files(tiny_wikitext_dir: Path) -> None:
    corpus = published_corpus("wikitext-2", tiny_wikitext_dir)
    assert corpus.name == "wikitext-2"
    for split, name in zip([corpus.train, corpus.valid, corpus.test], WIKI.values(), strict=True):
        text = (tiny_wikitext_dir / name).read_text(encoding="utf-8")
        assert corpus.tokenizer.decode(split.tokens.tolist()) == text
        assert split.tokens.dtype == torch.int64
        assert split.text_bytes == len(text.encode()) > len(text)
        assert split.bytes_per_token == len(text.encode()) / len(split.tokens)
    assert corpus.test_text == (tiny_wikitext_dir / WIKI["test.txt"]).read_text(encoding="utf-8")


def test_the_vocabulary_counts_the_train_split_alone(tiny_wikitext_dir: Path) -> None:
    with (tiny_wikitext_dir / WIKI["valid.txt"]).open("a", encoding="utf-8") as file:
        file.write("grey. " * 1000)
    train = (tiny_wikitext_dir / WIKI["train.txt"]).read_text(encoding="utf-8").replace("grey", "grey.", 1)
    (tiny_wikitext_dir / WIKI["train.txt"]).write_text(train, encoding="utf-8")
    tokenizer = load_corpus("wikitext-2", tiny_wikitext_dir).tokenizer
    assert isinstance(tokenizer, Vocabulary)
    assert tokenizer.words == ["<eos>", *(word for word, _ in Counter(train.split()).most_common())]


def test_the_last_line_of_a_file_needs_no_newline(tiny_wikitext_dir: Path) -> None:
    path = tiny_wikitext_dir / WIKI["test.txt"]
    before = published_corpus("wikitext-2", tiny_wikitext_dir).test.tokens
    path.write_text(path.read_text(encoding="utf-8").removesuffix("\n").removesuffix("\n"), encoding="utf-8")
    after = published_corpus("wikitext-2", tiny_wikitext_dir).test.tokens
    assert torch.equal(after, before[:-1])  # the empty line is gone, the end of the last sentence is not


def test_a_folder_may_be_the_parent(tiny_wikitext_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    shutil.copytree(tiny_wikitext_dir, tmp_path / "data" / "wikitext-2")
    assert torch.equal(
        published_corpus("wikitext-2", tmp_path / "data").train.tokens,
        published_corpus("wikitext-2", str(tiny_wikitext_dir)).train.tokens,
    )


def test_a_text_in_three_files_is_coded_without_loss(tiny_corpus_dir: Path) -> None:
    raw = (tiny_corpus_dir / "test.txt").read_bytes().replace(b"\n", b"\r\n")
    (tiny_corpus_dir / "test.txt").write_bytes(raw)
    corpus = text_corpus(tiny_corpus_dir, vocab_size=300)
    assert (corpus.name, corpus.tokenizer.kind, corpus.tokenizer.size) == ("text", "byte-pair", 300)
    for split, name in [(corpus.train, "train"), (corpus.valid, "valid"), (corpus.test, "test")]:
        content = (tiny_corpus_dir / f"{name}.txt").read_bytes()
        assert corpus.tokenizer.decode(split.tokens.tolist()).encode() == content
        assert split.text_bytes == len(content)
        assert split.bytes_per_token == len(content) / len(split.tokens) > 1
    assert corpus.test_text == raw.decode()


def test_bits_per_byte_of_a_uniform_guess(tiny_corpus_dir: Path) -> None:
    """With bytes as tokens, log(256) nats per token are the 8 bits of a byte; one token more is the end of a text."""
    split = text_corpus(tiny_corpus_dir, vocab_size=257).test
    assert split.bytes_per_token is not None
    assert math.log(256) / math.log(2) / split.bytes_per_token == 8


def test_load_corpus_by_name(tiny_corpus_dir: Path) -> None:
    corpus = load_corpus("text", tiny_corpus_dir, vocab_size=280)
    assert corpus.tokenizer.size == 280
    assert torch.equal(corpus.train.tokens, text_corpus(tiny_corpus_dir, vocab_size=280).train.tokens)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "wikitext"}, "no corpus 'wikitext'; choose python-docs, wikitext-103, .*, text8, copy-memory or text"),
        (
            {"name": "wikitext-2"},
            "wikitext-2 is not in .*; fetch it with: equilibria data get wikitext-2, or name with --data-dir",
        ),
        ({"name": "text"}, "text is read from a folder or a data set; name the folder with --data-dir"),
        ({"name": "enwik8", "text": TextOptions(valid_share=0.1)}, "are for the corpus text, not for enwik8"),
        ({"name": "python-docs", "data_dir": "."}, r"installation, not read from \.; leave the data folder out"),
        ({"name": "copy-memory", "data_dir": "."}, r"generated, not read from \.; leave the data folder out"),
        ({"name": "copy-memory", "vocab_size": 300}, "all its symbols; leave the vocabulary size out"),
        ({"name": "copy-memory", "delay": 0}, "no delay of 0; give at least 1"),
        ({"name": "python-docs", "delay": 5}, "python-docs has no delay"),
        ({"name": "text", "original_vocabulary": True}, "the original code has no vocabulary of text"),
        ({"name": "penn-treebank-char", "original_vocabulary": True}, "no vocabulary of penn-treebank-char"),
        ({"name": "penn-treebank", "data_dir": ".", "vocab_size": 300}, "leave the vocabulary size out"),
    ],
)
def test_load_corpus_refuses(arguments: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_corpus(**arguments)


@pytest.mark.parametrize("name", ["wikitext-2", "penn-treebank"])
def test_a_folder_that_is_not_there_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent does not exist; name a folder that holds .*train") as error:
        load_corpus(name, tmp_path / "absent")
    assert "\n" not in str(error.value)
    (tmp_path / "file").write_text("text")
    with pytest.raises(UserError, match="file is not a folder"):
        load_corpus(name, tmp_path / "file")


@pytest.mark.parametrize("name", ["wikitext-103", "wikitext-2", "penn-treebank", "penn-treebank-char"])
def test_the_file_names_of_the_original_will_do(tiny_corpus_dir: Path, name: str) -> None:
    """Its get_data.sh renames what it fetches."""
    renamed = published_corpus(name, tiny_corpus_dir)
    (tiny_corpus_dir.parent / "data").mkdir()
    tiny_corpus_dir.rename(tiny_corpus_dir.parent / "data" / name)
    below = published_corpus(name, tiny_corpus_dir.parent / "data")
    assert counts(renamed) == counts(below)
    assert renamed.train.text_bytes == (tiny_corpus_dir.parent / "data" / name / "train.txt").stat().st_size


def test_the_own_names_come_first(tiny_wikitext_dir: Path) -> None:
    for name in WIKI:
        (tiny_wikitext_dir / name).write_text("other\n")
    assert published_corpus("wikitext-2", tiny_wikitext_dir).tokenizer.size > 2


def test_files_that_are_not_there_are_named_with_where_and_whence(tiny_wikitext_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"wiki\.train.*valid.*test\.tokens in .* or .*wikitext-2; .*https://"):
        published_corpus("wikitext-2", tmp_path)
    (tiny_wikitext_dir / WIKI["valid.txt"]).unlink()
    with pytest.raises(UserError, match=r"^there is no wiki\.valid\.tokens in [^ ]*tiny-corpus; .*https://"):
        published_corpus("wikitext-2", tiny_wikitext_dir)
    with pytest.raises(UserError, match=r"ptb\.train\.txt.*penn-treebank; .*simple-examples"):
        published_corpus("penn-treebank", tmp_path)


@pytest.mark.parametrize("content", ["", "\n \n"])
@pytest.mark.parametrize("name", ["train", "valid", "test"])
def test_an_empty_file_is_named(name: str, content: str, tiny_corpus_dir: Path) -> None:
    (tiny_corpus_dir / f"{name}.txt").write_text(content)
    with pytest.raises(UserError, match=rf"{name}\.txt is empty"):
        text_corpus(tiny_corpus_dir, vocab_size=280)
    for file, wiki_name in WIKI.items():
        (tiny_corpus_dir / file).rename(tiny_corpus_dir / wiki_name)
    with pytest.raises(UserError, match=rf"wiki\.{name}\.tokens is empty"):
        published_corpus("wikitext-2", tiny_corpus_dir)


def test_a_file_that_is_not_utf8_is_named(tiny_corpus_dir: Path) -> None:
    (tiny_corpus_dir / "valid.txt").write_bytes("one\ntwo\ncaf\xe9\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"line 3 of .*valid\.txt is not UTF-8"):
        text_corpus(tiny_corpus_dir, vocab_size=280)


def test_a_word_that_train_lacks_is_named(tiny_wikitext_dir: Path) -> None:
    (tiny_wikitext_dir / WIKI["test.txt"]).write_text("The new\n")
    with pytest.raises(UserError, match=r"'new' of .*wiki\.test\.tokens is not among the words of the train split"):
        published_corpus("wikitext-2", tiny_wikitext_dir)


def test_too_small_a_vocabulary_is_the_users_error(tiny_corpus_dir: Path) -> None:
    with pytest.raises(UserError, match="vocab_size is 100; it must be at least 257"):
        text_corpus(tiny_corpus_dir, vocab_size=100)


def test_a_corpus_in_the_cache_needs_no_folder(tiny_wikitext_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_wikitext_dir, tmp_path / "cache" / "data" / "wikitext-2")
    assert torch.equal(load_corpus("wikitext-2").test.tokens, load_corpus("wikitext-2", tiny_wikitext_dir).test.tokens)
    (tmp_path / "cache" / "data" / "wikitext-2" / WIKI["valid.txt"]).unlink()
    with pytest.raises(UserError, match=r"no wiki\.valid\.tokens in .*: fetch them with: equilibria data get wikitext-2"):
        load_corpus("wikitext-2")


def test_the_original_counts_all_of_the_penn_treebank_in_lower_case(tmp_path: Path) -> None:
    for name, text in {"train": "the N cat\n", "valid": "a cat N\n", "test": "a dog A\n"}.items():
        (tmp_path / f"ptb.{name}.txt").write_text(text)
    corpus = load_corpus("penn-treebank", tmp_path, original_vocabulary=True)
    assert isinstance(corpus.tokenizer, Vocabulary)
    assert corpus.tokenizer.words == ["<eos>", "a", "n", "cat", "the", "dog"]
    assert corpus.test.tokens.tolist() == [1, 5, 1, 0]
    with pytest.raises(UserError, match=r"'a' of .*ptb\.valid\.txt is not among the words of the train split"):
        load_corpus("penn-treebank", tmp_path)


def test_the_original_vocabulary_of_real_corpora_is_a_reordering(shared_data: Path) -> None:
    plain = load_corpus("penn-treebank", shared_data)
    original = load_corpus("penn-treebank", shared_data, original_vocabulary=True)
    assert isinstance(plain.tokenizer, Vocabulary)
    assert isinstance(original.tokenizer, Vocabulary)
    assert plain.tokenizer.words != original.tokenizer.words
    assert sorted(word.lower() for word in plain.tokenizer.words) == sorted(original.tokenizer.words)
    lower = [plain.tokenizer.words[i].lower() for i in plain.valid.tokens]
    assert lower == [original.tokenizer.words[i] for i in original.valid.tokens]
