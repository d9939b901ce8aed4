"""Masks as recorded, for every kind of dropout; and the dropout of whole words."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from recorded import TOLERANCES, read, same
from torch import nn

from equilibria.nn import FrozenDropout, WordDropout

F64 = torch.float64


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_recorded_masks(shared_golden, dtype):
    """What is shared shows in the shape of the recorded mask; ours has it, with the same two values."""
    config, groups = read(shared_golden / "component_dropouts", dtype)
    masked = [recorded for recorded in groups.values() if "mask" in recorded]
    assert masked
    for recorded in masked:
        x, mask = recorded["x"], recorded["mask"]
        drop = FrozenDropout(config["p"], [i for i in range(x.dim()) if mask.shape[i] == 1])
        torch.manual_seed(0)
        values = torch.cat([torch.as_tensor(drop.mask(x)).flatten() for _ in range(50)]).unique()
        same(values, mask.unique())
        assert torch.as_tensor(drop.mask(x)).shape == mask.shape
        same(drop(x, mask), recorded["out"])


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("freeze", [True, False])
def test_recorded_lookup(shared_golden, dtype, freeze):
    config, groups = read(shared_golden / "component_dropouts", dtype)
    recorded = groups["embedded"]
    weight, ids = recorded["weight"].requires_grad_(), recorded["ids"]
    mask = torch.ones(len(weight), 1, dtype=dtype)
    mask[ids] = (recorded["out"] / weight[ids]).detach()[..., :1]  # of the words that occur
    drop: Any = WordDropout(config["p"], freeze_last_row=freeze)
    drop.drop.mask = lambda like: mask
    out = drop(weight, ids)
    same(out, recorded["out"])
    out.backward(recorded["upstream"])
    same(weight.grad, recorded["grad_original" if freeze else "grad_without_padding_quirk"])


def test_a_word_is_dropped_wherever_it_occurs():
    torch.manual_seed(0)
    weight, ids = torch.randn(30, 4, dtype=F64), torch.randint(30, (6, 50))
    drop = WordDropout(0.4)
    for _ in range(3):
        ratio = drop(weight, ids) / weight[ids]
        assert {round(v, 6) for v in ratio.unique().tolist()} == {0.0, round(1 / 0.6, 6)}
        for word in ids.unique().tolist():
            assert (ratio[ids == word] == 0).unique().numel() == 1


def test_is_the_lookup_in_the_masked_table():
    weight, ids = torch.randn(9, 4, dtype=F64, requires_grad=True), torch.randint(9, (2, 5))
    drop = WordDropout(0.4)
    torch.manual_seed(3)
    found = drop(weight, ids)
    torch.manual_seed(3)
    mask = drop.drop.mask(weight)
    assert mask is not None
    assert mask.shape == (9, 1)
    expected = nn.functional.embedding(ids, weight * mask)
    torch.testing.assert_close(found, expected, rtol=1e-15, atol=0)
    upstream = torch.randn_like(found)
    gradients = (torch.autograd.grad(y, weight, upstream)[0] for y in (found, expected))
    torch.testing.assert_close(*gradients, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("freeze", [True, False])
def test_the_last_row_is_frozen_only_on_request(p, training, freeze):
    weight, ids = torch.ones(3, 2, requires_grad=True), torch.tensor([[2, 1, 2]])
    drop: Any = WordDropout(p, freeze_last_row=freeze).train(training)
    drop.drop.mask = lambda like: torch.tensor([[0.0], [1.0], [1.0]]) if training and p else None
    drop(weight, ids).sum().backward()
    gradient = torch.as_tensor(weight.grad)
    assert gradient[1].tolist() == [1.0, 1.0]
    assert gradient[2].tolist() == ([0.0, 0.0] if freeze else [2.0, 2.0])


def test_nothing_is_dropped_in_evaluation_or_with_p_zero():
    weight, ids = torch.randn(9, 4), torch.randint(9, (2, 5))
    assert torch.equal(WordDropout(0.4).eval()(weight, ids), weight[ids])
    assert torch.equal(WordDropout(0.0)(weight, ids), weight[ids])


def test_impossible_probability():
    with pytest.raises(ValueError, match="at least 0 and below 1"):
        WordDropout(1.0)


@pytest.mark.parametrize("word", [-1, 9])
def test_refuses_words_outside_of_the_vocabulary(word):
    with pytest.raises(ValueError, match="but the vocabulary has 9 words, 0 to 8"):
        WordDropout(0.5)(torch.randn(9, 4), torch.tensor([[0, word]]))
