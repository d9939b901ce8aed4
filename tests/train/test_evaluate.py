from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from equilibria.data import Split, copy_memory
from equilibria.models.language_model import LMOutput
from equilibria.solution import Stats, Status
from equilibria.train.evaluate import evaluate
from equilibria.train.solves import SolveMeter


class Counter(nn.Module):
    """Predicts with probability p that the next token is one more; its memory is the last token of each lane."""

    def __init__(self, p: float = 0.25) -> None:
        super().__init__()
        self.p = p
        self.memories: list[Tensor | None] = []
        self.was_training = False

    def forward(self, tokens: Tensor, targets: Tensor, memory: Any = None, *, depth: int | None = None) -> LMOutput:
        self.memories.append(memory)
        self.was_training |= self.training or torch.is_grad_enabled()
        right = targets == tokens + 1
        nll = torch.where(right, -math.log(self.p), -math.log(1 - self.p))
        rows = len(tokens)
        stats = Stats(
            residual=torch.ones(rows),
            relative=torch.arange(rows) / 10,
            evaluations=3 + len(self.memories),
            steps=torch.ones(rows, dtype=torch.int64),
            status=torch.tensor([Status.EXHAUSTED] + [Status.CONVERGED] * (rows - 1), dtype=torch.int8),
        )
        return LMOutput(nll, tokens[:, -1], [] if depth else [stats])  # type: ignore[arg-type]


def test_counts_every_target_once_and_carries_the_memory():
    tokens = torch.arange(103)
    tokens[50:] += 1  # one wrong step, from 49 to 51
    model = Counter()
    result = evaluate(model, Split(tokens, text_bytes=206), batch_size=2, length=10)
    lane = 103 // 2
    assert result.tokens == 2 * (lane - 1)
    wrong = 1
    expected = ((result.tokens - wrong) * -math.log(0.25) + wrong * -math.log(0.75)) / result.tokens
    assert result.nll == pytest.approx(expected, rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(result.nll))
    assert result.bits_per_byte == pytest.approx(result.nll / math.log(2) * 103 / 206)
    assert model.memories[0] is None
    assert [m[0].item() for m in model.memories[1:] if m is not None] == [9, 19, 29, 39]
    assert not model.was_training
    assert model.training, "the mode is put back"


def test_means_over_solves():
    result = evaluate(Counter(), Split(torch.arange(103), 206), batch_size=2, length=10)
    assert result.evaluations == pytest.approx((4 + 5 + 6 + 7 + 8) / 5)
    assert result.residual == pytest.approx(0.05)
    assert result.unconverged == pytest.approx(0.5)
    stacked = evaluate(Counter(), Split(torch.arange(103), 206), batch_size=2, length=10, depth=4)
    assert (stacked.evaluations, stacked.residual, stacked.unconverged) == (None, None, None)


def test_every_target_weighs_the_same_whatever_its_batch():
    """Segments of 10, 10, ... and a shorter last one: the mean is over targets, not over segments."""
    tokens = torch.arange(47)
    tokens[-2:] += 1  # one wrong step, in the last segment, of 6 targets
    result = evaluate(Counter(), Split(tokens, text_bytes=47), batch_size=1, length=10)
    assert result.tokens == 46
    assert result.nll == pytest.approx((45 * -math.log(0.25) - math.log(0.75)) / 46, rel=1e-6)


def test_first_segments_alone_can_be_read():
    model = Counter()
    result = evaluate(model, Split(torch.arange(103), text_bytes=103), batch_size=2, length=10, max_steps=2)
    assert (result.tokens, len(model.memories)) == (40, 2)
    assert evaluate(model, Split(torch.arange(103), 103), batch_size=2, length=10, max_steps=99).tokens == 100


def test_independent_sequences_begin_with_no_memory_and_have_no_bits_per_byte():
    split = copy_memory(3, train=1, valid=1, test=7).test
    model = Counter()
    result = evaluate(model, split, batch_size=3, length=23)
    assert model.memories == [None, None, None]
    assert result.tokens == 7 * 23
    assert result.bits_per_byte is None


def test_short_split_is_read_in_fewer_lanes():
    result = evaluate(Counter(), Split(torch.arange(5), 5), batch_size=64, length=10)
    assert result.tokens == 2
    assert evaluate(Counter(), Split(torch.arange(2), 2), batch_size=64, length=10).tokens == 1


def test_huge_loss_does_not_overflow():
    result = evaluate(Counter(p=1e-320), Split(torch.arange(30), 30), batch_size=1, length=10)
    assert math.isfinite(result.perplexity)
    assert result.nll > 700


def test_meter_starts_empty_and_forgets():
    meter = SolveMeter()
    assert meter.means() is None
    meter(
        Stats(
            residual=torch.ones(2),
            relative=torch.tensor([0.5, 0.25]),
            evaluations=7,
            steps=torch.ones(2, dtype=torch.int64),
            status=torch.tensor([0, 1], dtype=torch.int8),
        )
    )
    means = meter.means()
    assert means is not None
    assert (means.evaluations, means.residual, means.unconverged) == (7.0, 0.375, 0.5)
    meter.reset()
    assert meter.means() is None
