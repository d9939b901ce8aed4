from __future__ import annotations

import hashlib

import pytest
import torch

from equilibria.data import Batches, Corpus, OrderedBatches, SequenceSplit, Split, Vocabulary
from equilibria.solution import UserError


def test_a_text_is_read_in_order_and_on_the_device() -> None:
    split = Split(torch.arange(100, dtype=torch.int32), 400)
    batches: Batches = split.batches(4, 6, "cpu", seed=5)
    assert isinstance(batches, OrderedBatches)
    assert batches[1][0].tolist() == [[25 * b + p for p in range(6, 12)] for b in range(4)]
    assert split.batches(4, 6, "meta")[0][0].device.type == "meta"
    assert split.bytes_per_token == 4


@pytest.mark.parametrize("count", [2, 3, 7, 100])
def test_the_largest_batch_size_can_be_had_and_no_larger(count: int) -> None:
    split = Split(torch.arange(count), count)
    assert len(split.batches(split.max_batch_size, 5)) >= 1
    with pytest.raises(UserError):
        split.batches(split.max_batch_size + 1, 5)
    sequences = SequenceSplit(
        torch.zeros(count, 3, dtype=torch.int64), None, targets=torch.zeros(count, 3, dtype=torch.int64)
    )
    assert len(sequences.batches(sequences.max_batch_size, 3)) == 1
    with pytest.raises(UserError):
        sequences.batches(sequences.max_batch_size + 1, 3)


def test_the_fingerprint_is_that_of_the_numbers_whatever_their_type() -> None:
    tokens = torch.randint(0, 200, (3_000_000,))
    expected = hashlib.sha256(tokens.numpy().tobytes()).hexdigest()
    assert Split(tokens, None).fingerprint == Split(tokens.to(torch.int32), 5).fingerprint == expected
    assert Split(tokens.flip(0), None).fingerprint != expected


def test_the_fingerprint_of_a_corpus_is_that_of_the_splits_that_a_run_depends_on() -> None:
    a, b = Split(torch.arange(50), None), Split(torch.arange(9), None)
    words = Vocabulary(["<eos>"])
    found = {Corpus("x", *splits, words, None).fingerprint for splits in [(a, b, b), (a, b, a), (a, a, b), (b, b, b)]}
    assert len(found) == 3


def test_the_fingerprint_is_computed_once() -> None:
    split = Split(torch.arange(50), None)
    before = split.fingerprint
    split.tokens.zero_()
    assert split.fingerprint == before


def test_the_fingerprint_of_sequences_holds_their_targets() -> None:
    tokens = torch.arange(12).view(4, 3)
    one = SequenceSplit(tokens, None, targets=tokens)
    assert one.fingerprint != SequenceSplit(tokens, None, targets=tokens + 1).fingerprint
    assert one.fingerprint == SequenceSplit(tokens.to(torch.uint8), None, targets=tokens).fingerprint
