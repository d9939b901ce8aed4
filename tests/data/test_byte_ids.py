from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from equilibria.data import Bytes, Vocabulary, corpora, load_corpus, load_tokenizer
from equilibria.data.byte_ids import count_bytes
from equilibria.solution import UserError


@given(st.text())
def test_any_text_is_coded_without_loss_a_byte_a_token(text: str) -> None:
    assert Bytes().encode(text) == list(text.encode())
    assert Bytes().decode(Bytes().encode(text)) == text


def test_an_alphabet_gives_the_ids() -> None:
    tokenizer = Bytes(b"ba ")
    assert tokenizer.size == 3
    assert tokenizer.encode("a b") == [1, 2, 0]
    assert tokenizer.decode([1, 2, 0]) == "a b"
    with pytest.raises(UserError, match="the byte b'c' is not among the 3 of the alphabet"):
        tokenizer.encode("abc")
    for i in (-1, 3):
        with pytest.raises(ValueError, match=f"id {i} is outside the vocabulary; ids are 0 to 2"):
            tokenizer.decode([i])
    for alphabet in (b"", b"aa"):
        with pytest.raises(ValueError, match="at least one byte, and none twice"):
            Bytes(alphabet)


@pytest.mark.parametrize("alphabet", [b"xyz", bytes(range(256))])
def test_a_saved_alphabet_is_read_back(alphabet: bytes, tmp_path: Path) -> None:
    Bytes(alphabet).save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert isinstance(again, Bytes)
    assert again.alphabet == alphabet


def test_bytes_that_are_no_character_become_one() -> None:
    assert Bytes().decode("é".encode()[:1]) == "\N{REPLACEMENT CHARACTER}"


@given(st.lists(st.lists(st.integers(0, 255)), min_size=1, max_size=3))
def test_bytes_by_count_are_those_of_a_vocabulary(parts: list[list[int]]) -> None:
    names = {value: str(value) for value in range(256) if value != 10}
    tokens, vocabulary = count_bytes([torch.tensor(part, dtype=torch.uint8) for part in parts], names)
    lines = [" ".join(str(value) for value in part if value != 10) for part in parts]
    assert vocabulary.words == Vocabulary.build(lines, end_of_line=False).words
    assert [part.tolist() for part in tokens] == [vocabulary.encode(line) for line in lines]


@pytest.fixture
def scaled_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files of 2,000 bytes in place of a hundred million."""
    monkeypatch.setattr(corpora, "HUNDRED_MILLION", 2000)
    letters = torch.randint(0, 27, (2000,), generator=torch.Generator().manual_seed(0)).tolist()
    letters[1799] = letters[1900] = 0  # a space at the end of a split, and one at the beginning of another
    (tmp_path / "text8").write_bytes(bytes(corpora.TEXT8_ALPHABET[i] for i in letters))
    (tmp_path / "enwik8").write_bytes(bytes(i % 251 for i in range(1999)) + b"\n")
    return tmp_path


@pytest.mark.parametrize("name", ["enwik8", "text8"])
def test_the_splits_are_ninety_and_twice_five_percent(name: str, scaled_down: Path) -> None:
    corpus = load_corpus(name, scaled_down)
    content = (scaled_down / name).read_bytes()
    assert corpus.tokenizer.size == {"enwik8": 256, "text8": 27}[name]
    start, text = 0, ""
    for split, length in zip((corpus.train, corpus.valid, corpus.test), (1800, 100, 100), strict=True):
        assert len(split.tokens) == split.text_bytes == length
        assert split.bytes_per_token == 1
        text = content[start : start + length].decode(errors="replace")
        assert corpus.tokenizer.decode(split.tokens.tolist()) == text
        start += length
    assert corpus.test_text == text
    if name == "enwik8":
        assert bytes(corpus.valid.tokens.tolist()) == content[1800:1900]


def test_the_original_enwik8_has_no_newlines(scaled_down: Path) -> None:
    corpus = load_corpus("enwik8", scaled_down, original_vocabulary=True)
    content = (scaled_down / "enwik8").read_bytes()
    words = [str(value) for value, _ in Counter(value for value in content if value != 10).most_common()]
    assert isinstance(corpus.tokenizer, Vocabulary)
    assert corpus.tokenizer.words == words
    decoded = corpus.tokenizer.decode(corpus.train.tokens.tolist())
    assert decoded.split() == [str(value) for value in content[:1800] if value != 10]
    assert corpus.test.text_bytes == len(corpus.test.tokens)
    assert len(corpus.test.tokens) < 100


def test_the_original_text8_has_no_spaces_at_the_ends_of_splits(scaled_down: Path) -> None:
    corpus = load_corpus("text8", scaled_down, original_vocabulary=True)
    content = (scaled_down / "text8").read_text()
    assert corpus.tokenizer.size == 27
    for split, text in [(corpus.train, content[:1800]), (corpus.valid, content[1800:1900]), (corpus.test, content[1900:])]:
        decoded = corpus.tokenizer.decode(split.tokens.tolist())
        assert decoded == " ".join(text.strip().replace(" ", "_"))
    assert len(corpus.train.tokens) < 1800
    assert len(corpus.test.tokens) < 100


def test_a_file_of_another_size_is_refused(tmp_path: Path) -> None:
    (tmp_path / "enwik8").write_bytes(b"short")
    with pytest.raises(UserError, match=r"enwik8 has 5 bytes, but enwik8 has 100,000,000; fetch it again"):
        load_corpus("enwik8", tmp_path)


def test_a_byte_that_is_no_letter_is_named(scaled_down: Path) -> None:
    (scaled_down / "text8").write_bytes(b"a" * 1999 + b"A")
    with pytest.raises(UserError, match="the byte b'A' is not among the 27"):
        load_corpus("text8", scaled_down)
