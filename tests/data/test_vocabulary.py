from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from equilibria.data import Vocabulary, load_tokenizer
from equilibria.solution import UserError

words = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zs", "Zl", "Zp"]), min_size=1, max_size=4).filter(
    lambda word: word != "<eos>"
)
few_words = st.sampled_from(["a", "b", "c", "A", "B", "<unk>", "été"])
canonical_texts = st.lists(st.lists(words | few_words).map(" ".join)).map(lambda lines: "".join(f"{x}\n" for x in lines))


@given(canonical_texts, st.lists(words, min_size=1).map(" ".join))
def test_decode_gives_back_a_text_of_words_one_space_apart(text: str, rest: str) -> None:
    text += rest  # a prompt may end within a line
    vocabulary = Vocabulary.build(text.split("\n"))
    assert vocabulary.decode(vocabulary.encode(text)) == text


@given(st.text(st.sampled_from(" \n\t\r\u2028\u00a0ab")))
def test_white_space_within_lines_is_all_that_a_round_trip_changes(text: str) -> None:
    vocabulary = Vocabulary.build(text.split("\n"))
    ids = vocabulary.encode(text)
    decoded = vocabulary.decode(ids)
    assert vocabulary.encode(decoded) == ids
    assert decoded.split() == text.split()
    assert decoded.count("\n") == text.count("\n")


@given(st.lists(st.lists(few_words).map(" ".join)))
def test_every_line_ends_with_eos_an_empty_one_too(lines: list[str]) -> None:
    vocabulary = Vocabulary.build(lines)
    tokens = vocabulary.encode_lines(lines)
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == vocabulary.encode("".join(f"{line}\n" for line in lines))
    assert tokens.tolist() == vocabulary.encode_lines(f"{line}\n" for line in lines).tolist()
    assert len(tokens) == sum(len(line.split()) for line in lines) + len(lines)
    assert (tokens == 0).sum() == len(lines)


@given(st.lists(few_words, min_size=1))
def test_words_stand_by_descending_count_then_first_appearance(text: list[str]) -> None:
    vocabulary = Vocabulary.build([" ".join(text)], specials=("<eos>", "b"))
    counts = Counter(text)
    expected = sorted(set(text) - {"b"}, key=lambda word: (-counts[word], text.index(word)))
    assert vocabulary.words == ["<eos>", "b", *expected]
    assert vocabulary.size == len(vocabulary.words)


def test_case_is_kept() -> None:
    assert Vocabulary.build(["The the"]).words == ["<eos>", "The", "the"]


def test_case_is_folded_where_that_is_asked_for() -> None:
    vocabulary = Vocabulary.build(["The the A"], lower_case=True)
    assert vocabulary.words == ["<eos>", "the", "a"]
    assert vocabulary.encode("THE a\n") == vocabulary.encode_lines(["The A"]).tolist() == [1, 2, 0]


def test_without_ends_of_lines_a_newline_is_white_space() -> None:
    vocabulary = Vocabulary.build(["a b", "b <eos>"], end_of_line=False)
    assert vocabulary.words == ["b", "a", "<eos>"]
    assert vocabulary.encode("a\nb\n") == vocabulary.encode_lines(["a", "b"]).tolist() == [1, 0]
    assert vocabulary.decode([1, 2, 0]) == "a <eos> b"


def test_an_unknown_word_becomes_unk_where_there_is_one() -> None:
    vocabulary = Vocabulary.build(["a <unk> b"])
    assert vocabulary.decode(vocabulary.encode("a new\nb")) == "a <unk>\nb"


def test_an_unknown_word_in_the_lines_of_a_corpus_is_an_error_even_where_there_is_unk() -> None:
    vocabulary = Vocabulary.build(["a <unk> b"])
    assert vocabulary.encode_lines(["<unk>"]).tolist() == vocabulary.encode("<unk>\n")
    with pytest.raises(UserError, match="'new' is not among the 4 words"):
        vocabulary.encode_lines(["a new"])


def test_an_unknown_word_is_an_error_where_there_is_no_unk() -> None:
    vocabulary = Vocabulary.build(["a b"])
    with pytest.raises(UserError, match="'new' is not among the 3 words"):
        vocabulary.encode("a new")
    with pytest.raises(UserError, match="'new'"):
        vocabulary.encode_lines(["a", "b new"])


@given(st.lists(words | few_words, unique=True))
def test_a_saved_vocabulary_is_read_back(tmp_path_factory: pytest.TempPathFactory, more: list[str]) -> None:
    folder = tmp_path_factory.mktemp("saved")
    for options in itertools.product([True, False], repeat=2):
        vocabulary = Vocabulary(["<eos>", *more], end_of_line=options[0], lower_case=options[1])
        vocabulary.save(folder)
        again = load_tokenizer(folder)
        assert isinstance(again, Vocabulary)
        assert again.words == vocabulary.words
        assert (again.end_of_line, again.lower_case) == options


def test_a_vocabulary_saved_before_it_had_options_is_read(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"kind": "words", "words": ["<eos>", "a"]}')
    vocabulary = load_tokenizer(tmp_path)
    assert vocabulary.encode("a\n") == [1, 0]


@pytest.mark.parametrize("i", [-1, 3])
def test_decode_refuses_ids_outside(i: int) -> None:
    with pytest.raises(ValueError, match=f"id {i} is outside the vocabulary; ids are 0 to 2"):
        Vocabulary(["<eos>", "a", "b"]).decode([0, i])


def test_misuse() -> None:
    with pytest.raises(ValueError, match="'a' more than once"):
        Vocabulary(["<eos>", "a", "a"])
    with pytest.raises(ValueError, match="lacks '<eos>'"):
        Vocabulary(["a"])
