from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from equilibria.data import Split, VariableLengthBatches


def bounds(batches: VariableLengthBatches) -> list[int]:
    return [int(inputs[0, 0]) for inputs, _ in batches]


@given(st.integers(2, 300), st.integers(1, 4), st.integers(1, 30), st.integers(0, 99), st.integers(0, 3))
def test_segments_put_together_are_the_text(lane: int, batch: int, length: int, seed: int, epoch: int) -> None:
    tokens = torch.arange(lane * batch)
    batches = VariableLengthBatches(tokens, batch, length, seed=seed).at_epoch(epoch)
    parts = list(batches)
    inputs = torch.cat([part for part, _ in parts], dim=1)
    assert torch.equal(inputs, tokens.view(batch, lane)[:, :-1])
    assert torch.equal(torch.cat([part for _, part in parts], dim=1), inputs + 1)
    assert len(parts) == len(batches)
    sizes = [part.shape[1] for part, _ in parts]
    assert all(5 <= size <= length + 15 for size in sizes[:-1])
    assert sizes[-1] <= length + 15


def test_lengths_have_the_mean_they_are_drawn_with() -> None:
    sizes = [part.shape[1] for part, _ in VariableLengthBatches(torch.arange(200_000), 1, 100, std=5, seed=3)]
    mean = sum(sizes[:-1]) / len(sizes[:-1])
    assert abs(mean - (0.95 * 100 + 0.05 * 50 - 0.5)) < 1  # rounding down takes half a token
    assert sum(size < 75 for size in sizes) / len(sizes) == pytest.approx(0.05, abs=0.02)


def test_the_cut_depends_on_seed_and_epoch_alone() -> None:
    tokens = torch.arange(500)
    first = VariableLengthBatches(tokens, 1, 20, seed=1)
    assert first.carries_memory
    cuts = [bounds(first), bounds(first.at_epoch(0)), bounds(first.at_epoch(1))]
    cuts.append(bounds(VariableLengthBatches(tokens, 1, 20, seed=2).at_epoch(1)))
    assert len(set(map(tuple, cuts))) == 4
    assert bounds(first.at_epoch(0).at_epoch(1)) == cuts[2]
    split = Split(tokens, None).batches(1, 20, seed=1, variable_length=True)
    assert isinstance(split, VariableLengthBatches)
    assert bounds(split) == cuts[0]


def test_a_last_segment_of_one_token_is_read_unless_it_is_to_be_dropped() -> None:
    """With no deviation the segments have 10 tokens (or 5), and a text of n 5 + 2 leaves one for the last."""
    differ = 0
    for lane in range(30, 60):
        kept = VariableLengthBatches(torch.arange(lane), 1, 10, std=0)
        dropped = VariableLengthBatches(torch.arange(lane), 1, 10, std=0, drop_single=True)
        last = kept[-1][0].shape[1]
        assert bounds(dropped) == (bounds(kept)[:-1] if last == 1 else bounds(kept))
        differ += last == 1
    assert differ
    assert len(VariableLengthBatches(torch.arange(2), 1, 10, drop_single=True)) == 1


def test_extended_context_and_options_stay_over_epochs() -> None:
    batches = VariableLengthBatches(torch.arange(300), 2, 10, std=2, min_length=3, max_deviation=1, extended_context=4)
    again = batches.at_epoch(2)
    assert (again.std, again.min_length, again.max_deviation, again.extended_context) == (2, 3, 1, 4)
    inputs, targets = again[3]
    assert inputs.shape[1] == targets.shape[1] + 4
    assert torch.equal(inputs[:, 4:] + 1, targets)


def test_misuse() -> None:
    for std, min_length, max_deviation in [(-1, 1, 1), (1, 0, 1), (1, 1, -1)]:
        with pytest.raises(ValueError, match="give at least 0 for the first two"):
            VariableLengthBatches(torch.arange(9), 1, 2, std=std, min_length=min_length, max_deviation=max_deviation)
