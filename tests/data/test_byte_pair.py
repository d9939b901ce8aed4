from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from equilibria.data import BytePair, load_tokenizer
from equilibria.data.carve import pieces

TEXT = "the cat sat on the mat\n\n  the hat's on the cat, 12 + 12 = 24\n" * 4
TOKENIZER = BytePair.train(TEXT, vocab_size=275)

# Everything that decides where a word begins: white space of all kinds, letters, digits, marks and contractions.
edges = st.text(st.sampled_from("a t's1.é中\n\n \t\r\x0b\x1c\x85\u2028\u3000"))


@given(st.text() | edges)
def test_round_trip_of_any_text(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    assert all(0 <= i < TOKENIZER.size for i in ids)
    assert TOKENIZER.encode_tensor(text).tolist() == ids


@given(st.text() | edges, st.integers(1, 8))
def test_pieces_have_the_tokens_of_the_whole_text(text: str, size: int) -> None:
    parts = list(pieces(text, size))
    assert "".join(parts) == text
    assert all(parts)
    assert [i for part in parts for i in TOKENIZER.encode(part)] == TOKENIZER.encode(text)


def test_a_long_text_is_cut_and_has_the_tokens_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = TOKENIZER.encode(TEXT)
    assert len(list(pieces(TEXT, 10))) > 10
    monkeypatch.setattr("equilibria.data.byte_pair.PIECES_AT_ONCE", 3)
    monkeypatch.setattr("equilibria.data.byte_pair.pieces", lambda text: pieces(text, 10))
    assert TOKENIZER.encode(TEXT) == whole
    assert BytePair.train(TEXT, vocab_size=275).encode(TEXT) == whole


def test_nothing_in_a_text_is_special() -> None:
    for text in ["<eos>", "<unk><s></s>", "<|endoftext|>"]:
        ids = TOKENIZER.encode(text)
        assert len(ids) > 1
        assert TOKENIZER.decode(ids) == text


def test_a_larger_vocabulary_gives_fewer_tokens() -> None:
    counts = [len(BytePair.train(TEXT, vocab_size=size).encode(TEXT)) for size in (256, 264, 280)]
    assert counts[0] == len(TEXT.encode())
    assert counts == sorted(set(counts), reverse=True)


def test_size_is_what_was_asked_for_or_what_the_text_supports() -> None:
    assert TOKENIZER.size == 275
    assert BytePair.train("abc", vocab_size=1000).size == 256
    assert BytePair.train("ab ab", vocab_size=1000).size == 257


def test_too_small_a_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="vocab_size is 255; it must be at least 256"):
        BytePair.train(TEXT, vocab_size=255)


def test_a_saved_tokenizer_is_read_back_here_and_by_its_library(tmp_path: Path) -> None:
    TOKENIZER.save(tmp_path)
    again = load_tokenizer(tmp_path)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert isinstance(again, BytePair)
    assert again.size == TOKENIZER.size
    for text in [TEXT, "déjà vu\n", ""]:
        assert again.encode(text) == theirs.encode(text).ids == TOKENIZER.encode(text)
        assert again.decode(TOKENIZER.encode(text)) == text


def test_ids_that_end_within_a_character_decode_to_a_replacement() -> None:
    assert TOKENIZER.decode(TOKENIZER.encode("a中")[:-1]).startswith("a\ufffd")


@pytest.mark.parametrize("i", [-1, 275])
def test_decode_refuses_ids_outside(i: int) -> None:
    with pytest.raises(ValueError, match=f"id {i} is outside the vocabulary; ids are 0 to 274"):
        TOKENIZER.decode([0, i])
