from __future__ import annotations

import math

import pytest
import torch

from equilibria.data import SequenceSplit, copy_memory, load_corpus
from equilibria.solution import UserError


@pytest.fixture(scope="module")
def corpus():
    return copy_memory(delay=30, train=400, valid=50, test=60, seed=3)


def test_the_last_ten_targets_are_the_first_ten_tokens(corpus) -> None:
    for split, count in [(corpus.train, 400), (corpus.valid, 50), (corpus.test, 60)]:
        assert isinstance(split, SequenceSplit)
        assert split.tokens.shape == split.targets.shape == (count, 50)
        symbols = split.tokens[:, :10]
        assert symbols.unique().tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
        assert (split.tokens[:, 10:39] == 0).all()  # T - 1 blanks
        assert (split.tokens[:, 39:] == 9).all()  # the delimiter, and ten more
        assert (split.targets[:, :40] == 0).all()
        assert torch.equal(split.targets[:, 40:], symbols)


def test_a_guess_without_memory_scores_what_the_docstring_says(corpus) -> None:
    """Blanks known, and one symbol in eight right: 10 ln 8 / (T + 20) nats per position."""
    _, targets = corpus.train.batches(400, 50)[0]
    assert targets.shape == (400, 50)
    probability = torch.where(targets == 0, torch.tensor(1.0), torch.tensor(1 / 8))
    probability[:, 40:] = 1 / 8
    assert -probability.log().mean().item() == pytest.approx(10 * math.log(8) / 50, rel=1e-6)
    counts = targets[:, 40:].flatten().bincount(minlength=9)[1:]
    assert counts.sum() == 4000
    assert (counts - 500).abs().max() < 110  # 5 standard deviations of a binomial


def test_the_splits_depend_on_the_seed_alone_and_share_nothing(corpus) -> None:
    again = copy_memory(delay=30, train=5, valid=50, test=60, seed=3)
    assert torch.equal(again.test.tokens, corpus.test.tokens)
    other = copy_memory(delay=30, train=400, valid=50, test=60, seed=4)
    rows = [
        tuple(row)
        for part in (corpus, other)
        for split in (part.train, part.valid, part.test)
        for row in split.tokens[:, :10].tolist()
    ]
    assert len(set(rows)) == len(rows)
    assert corpus.fingerprint != other.fingerprint


def test_sizes_of_the_paper() -> None:
    corpus = load_corpus("copy-memory", delay=100)
    assert corpus.name == "copy-memory"
    assert corpus.train.tokens.shape == (20_000, 120)
    assert len(corpus.test.tokens) == len(corpus.valid.tokens) == 2_000
    assert load_corpus("copy-memory").test.tokens.shape == (2_000, 420)


def test_it_is_no_text_but_its_symbols_have_names(corpus) -> None:
    assert corpus.test_text is None
    assert corpus.test.text_bytes is corpus.test.bytes_per_token is None
    assert corpus.tokenizer.size == 10
    assert corpus.tokenizer.decode(corpus.test.tokens[0, -12:].tolist()) == "0 9 9 9 9 9 9 9 9 9 9 9"
    assert corpus.tokenizer.encode("1 0 9") == [1, 0, 9]


def test_sequences_are_not_cut(corpus) -> None:
    assert corpus.test.max_batch_size == 60
    batches = corpus.test.batches(60, 1000, seed=1)
    assert not batches.carries_memory
    assert [len(inputs) for inputs, _ in corpus.test.batches(25, 50)] == [25, 25, 10]
    with pytest.raises(UserError, match="have 50 tokens and are not cut, but the length is 49; give a length of 50"):
        corpus.test.batches(25, 49)
    for option in ({"variable_length": True}, {"extended_context": 2}):
        with pytest.raises(UserError, match="are for a text; leave them out"):
            corpus.test.batches(25, 50, **option)
    orders = [batches.at_epoch(epoch)[0][0] for epoch in (0, 1)]
    assert not torch.equal(*orders)
    assert not torch.equal(orders[0], corpus.test.batches(60, 50, seed=2).at_epoch(0)[0][0])


@pytest.mark.parametrize("name", ["delay", "train", "valid", "test"])
def test_misuse(name: str) -> None:
    with pytest.raises(UserError, match=f"no {name} of 0; give at least 1"):
        copy_memory(**{name: 0})
