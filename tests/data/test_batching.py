from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from equilibria.data import OrderedBatches, SequenceBatches
from equilibria.solution import UserError


@st.composite
def texts(draw: st.DrawFn) -> tuple[torch.Tensor, int, int]:
    """Distinct tokens, so that a token tells its place; a batch size they suffice for; a length."""
    batch_size = draw(st.integers(1, 6))
    count = draw(st.integers(2 * batch_size, 80))
    return torch.arange(count) + 1000, batch_size, draw(st.integers(1, 20))


@given(texts())
def test_lanes_put_together_are_the_text(text: tuple[torch.Tensor, int, int]) -> None:
    tokens, batch_size, length = text
    segments = list(OrderedBatches(tokens, batch_size, length))
    inputs = torch.cat([inputs for inputs, _ in segments], dim=1)  # (B, T - 1)
    targets = torch.cat([targets for _, targets in segments], dim=1)  # (B, T - 1)
    assert torch.equal(torch.cat([inputs, targets[:, -1:]], dim=1).flatten(), tokens[: inputs.numel() + batch_size])
    assert torch.equal(torch.cat([inputs[:, :1], targets], dim=1).flatten(), tokens[: inputs.numel() + batch_size])
    assert len(tokens) - batch_size < inputs.numel() + batch_size <= len(tokens)


@given(texts())
def test_each_token_is_where_the_equation_says(text: tuple[torch.Tensor, int, int]) -> None:
    tokens, batch_size, length = text
    batches = OrderedBatches(tokens, batch_size, length)
    lane = len(tokens) // batch_size
    assert len(batches) == math.ceil((lane - 1) / length)
    for i in range(len(batches)):
        inputs, targets = batches[i]
        positions = range(i * length, min((i + 1) * length, lane - 1))
        assert inputs.tolist() == [[int(tokens[b * lane + p]) for p in positions] for b in range(batch_size)]
        assert targets.tolist() == [[int(tokens[b * lane + p + 1]) for p in positions] for b in range(batch_size)]
        assert inputs.is_contiguous()
        assert targets.is_contiguous()
        assert inputs.dtype == targets.dtype == torch.int64


def test_a_segment_is_found_by_index_as_in_a_list() -> None:
    batches = OrderedBatches(torch.arange(50), 3, 4)
    segments = list(batches)
    assert len(segments) == len(batches) == 4
    for i in range(-4, 4):
        assert torch.equal(batches[i][0], segments[i][0])
        assert torch.equal(batches[i][1], segments[i][1])
    for i in (-5, 4):
        with pytest.raises(IndexError, match=f"segment {i} of 4"):
            batches[i]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_writing_into_a_batch_does_not_change_the_text(batch_size: int) -> None:
    tokens = torch.arange(30)
    batches = OrderedBatches(tokens, batch_size, 5)
    inputs, targets = batches[0]
    kept = targets.clone()
    inputs.zero_()
    assert torch.equal(targets, kept)
    targets.zero_()
    assert torch.equal(tokens, torch.arange(30))


def test_batches_are_made_on_the_device_and_from_small_integers() -> None:
    tokens = torch.arange(30, dtype=torch.uint8)
    inputs, targets = OrderedBatches(tokens, 2, 5, torch.device("meta"))[0]
    assert inputs.device.type == targets.device.type == "meta"
    assert OrderedBatches(tokens, 2, 5)[0][0].device == tokens.device
    assert OrderedBatches(tokens, 2, 5)[0][0].dtype == torch.int64


def test_two_tokens_per_lane_are_enough_and_fewer_are_an_error() -> None:
    inputs, targets = OrderedBatches(torch.arange(8), 4, 16)[0]
    assert inputs.tolist() == [[0], [2], [4], [6]]
    assert targets.tolist() == [[1], [3], [5], [7]]
    with pytest.raises(UserError, match="7 tokens are too few for a batch size of 4, which needs 8"):
        OrderedBatches(torch.arange(7), 4, 16)


def test_misuse() -> None:
    with pytest.raises(ValueError, match=r"shape \(2, 8\)"):
        OrderedBatches(torch.zeros(2, 8, dtype=torch.int64), 1, 1)
    with pytest.raises(TypeError, match=r"torch\.float32"):
        OrderedBatches(torch.zeros(8), 1, 1)
    for batch_size, length in [(0, 1), (1, 0), (-1, 1)]:
        with pytest.raises(ValueError, match="must be at least 1"):
            OrderedBatches(torch.arange(8), batch_size, length)


@given(texts(), st.integers(0, 25))
def test_extended_context_is_what_stands_before_the_segment(text: tuple[torch.Tensor, int, int], extra: int) -> None:
    plain = OrderedBatches(*text)
    extended = OrderedBatches(*text, extended_context=extra)
    assert len(plain) == len(extended)
    for i, ((inputs, targets), (more, same)) in enumerate(zip(plain, extended, strict=True)):
        assert torch.equal(same, targets)
        before = min(extra, i * plain.length)
        assert torch.equal(more[:, before:], inputs)
        assert torch.equal(more, plain.lanes[:, i * plain.length - before :][:, : before + inputs.shape[1]])


def test_an_ordered_text_is_the_same_in_every_epoch() -> None:
    batches = OrderedBatches(torch.arange(30), 2, 5)
    assert batches.carries_memory
    assert batches.at_epoch(7) is batches


def sequences(count: int, length: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = torch.arange(count * length).view(count, length)
    return inputs, -inputs


@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 5), st.integers(0, 5))
def test_every_sequence_is_seen_once_an_epoch_with_its_targets(count: int, size: int, seed: int, epoch: int) -> None:
    inputs, targets = sequences(count)
    batches = SequenceBatches(inputs, targets, min(size, count), seed=seed).at_epoch(epoch)
    parts = list(batches)
    assert len(parts) == len(batches) == math.ceil(count / batches.batch_size)
    assert all(len(part) == batches.batch_size for part, _ in parts[:-1])
    seen = torch.cat([part for part, _ in parts])
    assert torch.equal(torch.cat([part for _, part in parts]), -seen)
    assert torch.equal(seen.sort(dim=0).values, inputs)


def test_the_order_of_sequences_depends_on_seed_and_epoch_alone() -> None:
    inputs, targets = sequences(50)
    given_order = SequenceBatches(inputs, targets, 8)
    assert not given_order.carries_memory
    assert torch.equal(torch.cat([part for part, _ in given_order]), inputs)
    orders = {}
    for seed in range(3):
        for epoch in (2, 0, 1):
            batches = SequenceBatches(inputs, targets, 8, seed=seed).at_epoch(5).at_epoch(epoch)
            order = torch.cat([part for part, _ in batches])
            again = SequenceBatches(inputs, targets, 8, seed=seed).at_epoch(epoch)
            assert torch.equal(order, torch.cat([part for part, _ in again]))
            assert torch.equal(again[-1][0], order[48:])
            orders[seed, epoch] = tuple(order[:, 0].tolist())
    assert len(set(orders.values())) == 9
    assert torch.equal(torch.cat([part for part, _ in given_order]), inputs)


def test_sequences_are_made_on_the_device_from_small_integers_as_copies() -> None:
    inputs = torch.arange(6, dtype=torch.uint8).view(3, 2)
    for batches in (SequenceBatches(inputs, inputs, 2), SequenceBatches(inputs, inputs, 2).at_epoch(0)):
        part, targets = batches[0]
        assert part.dtype == targets.dtype == torch.int64
        part.zero_()
        assert torch.equal(inputs, torch.arange(6, dtype=torch.uint8).view(3, 2))
        assert not torch.equal(part, targets)
    part, targets = SequenceBatches(inputs, inputs, 2, "meta").at_epoch(1)[0]
    assert part.device.type == targets.device.type == "meta"


def test_misuse_of_sequences() -> None:
    inputs, targets = sequences(4)
    with pytest.raises(ValueError, match=r"inputs has shape \(4, 3\) and targets \(3, 3\)"):
        SequenceBatches(inputs, targets[1:], 1)
    with pytest.raises(ValueError, match=r"both must be \(N, L\)"):
        SequenceBatches(inputs[0], targets[0], 1)
    with pytest.raises(TypeError, match=r"targets has dtype torch\.float32"):
        SequenceBatches(inputs, targets.float(), 1)
    with pytest.raises(ValueError, match="batch_size is 0"):
        SequenceBatches(inputs, targets, 0)
    with pytest.raises(UserError, match="4 sequences are too few for a batch size of 5"):
        SequenceBatches(inputs, targets, 5)
    with pytest.raises(IndexError, match="segment 4 of 4"):
        SequenceBatches(inputs, targets, 1)[4]
    with pytest.raises(ValueError, match="extended_context is -1"):
        OrderedBatches(torch.arange(8), 1, 1, extended_context=-1)
