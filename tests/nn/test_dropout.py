"""Dropout with a frozen mask: what is drawn, and that a solve with it has a fixed point and the right gradient."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from problems import normal
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from equilibria import DEQ, Implicit, Picard, Stopping
from equilibria.nn.dropout import FrozenDropout

TIGHT = Stopping(rtol=1e-12, atol=1e-14, max_evals=200)


def test_nothing_is_dropped_in_evaluation_or_with_p_zero():
    x = torch.randn(2, 3, 4)
    assert FrozenDropout(0.5).eval().mask(x) is None
    assert FrozenDropout(0.0).mask(x) is None
    assert FrozenDropout(0.5)(x, None) is x


@pytest.mark.parametrize(
    ("shared_dims", "shape"), [((), (2, 3, 4)), ((1,), (2, 1, 4)), ((0, 2), (1, 3, 1)), ((-1,), (2, 3, 1))]
)
def test_one_draw_is_shared_along_shared_dims(shared_dims, shape):
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    drop = FrozenDropout(0.5, shared_dims)
    mask = drop.mask(x)
    assert mask is not None
    assert mask.shape == shape
    assert mask.dtype == x.dtype
    assert torch.equal(drop(x, mask), x * mask.expand_as(x))


def test_mask_is_bernoulli_over_its_keep_probability():
    torch.manual_seed(0)
    p, n = 0.3, 100_000
    mask = FrozenDropout(p).mask(torch.empty(n))
    assert mask is not None
    kept = mask != 0
    assert torch.allclose(mask[kept], torch.tensor(1 / (1 - p)))
    error = 5 * (p * (1 - p) / n) ** 0.5  # five standard deviations
    assert abs(kept.float().mean().item() - (1 - p)) < error


def test_the_mask_is_drawn_from_the_global_generator():
    drop, x = FrozenDropout(0.5), torch.empty(64)
    torch.manual_seed(1)
    first, second = drop.mask(x), drop.mask(x)
    torch.manual_seed(1)
    again = drop.mask(x)
    assert first is not None
    assert second is not None
    assert again is not None
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("p", [-0.1, 1.0, float("nan")])
def test_impossible_probability(p):
    with pytest.raises(ValueError, match="at least 0 and below 1"):
        FrozenDropout(p)


def test_impossible_shared_dimension():
    with pytest.raises(ValueError, match="shared_dims holds 3"):
        FrozenDropout(0.5, (3,)).mask(torch.empty(2, 2))


def test_a_shape_of_its_own():
    x = torch.randn(2, 7, 4, dtype=torch.float64)
    mask = FrozenDropout(0.5).mask(x, (2, 3, 7, 9))
    assert mask is not None
    assert (mask.shape, mask.dtype) == ((2, 3, 7, 9), x.dtype)
    shared = FrozenDropout(0.5, shared_dims=(0,)).mask(x, (2, 3, 7, 9))
    assert shared is not None
    assert shared.shape == (1, 3, 7, 9)


class Attention(nn.Module):
    """f(z) = tanh(0.5 hidden(P V z) + x) over a sequence z (B, L, d): H heads of softmax attention P.

    Masks of every kind, drawn in `prepare`: on the probabilities (B, H, L, L), on the hidden units of each head for all
    positions (B, H, 1, e), on the weights of the output.
    """

    batch_dims = (0, 0, 0, None)

    def __init__(self, p: float, heads: int = 2, width: int = 6) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width).double(), nn.Linear(width, width).double()
        self.on_attention, self.on_hidden, self.on_weights = (
            FrozenDropout(p), FrozenDropout(p, shared_dims=(2,)), FrozenDropout(p),
        )  # fmt: skip

    def prepare(self, x: Tensor) -> tuple[Any, ...]:
        batch, length, width = x.shape
        attention = self.on_attention.mask(x, (batch, self.heads, length, length))
        hidden = self.on_hidden.mask(x, (batch, self.heads, length, width // self.heads))
        weight = self.on_weights(self.out.weight, self.on_weights.mask(self.out.weight))
        return x, attention, hidden, weight

    def attend(self, z: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = self.qkv(z).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, H, L, e)
        probabilities = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
        return self.on_attention(probabilities, mask) @ v

    def forward(self, z: Tensor, x: Tensor, attention: Tensor | None, hidden: Tensor | None, weight: Tensor) -> Tensor:
        attended = self.on_hidden(self.attend(z, attention), hidden)
        joined = attended.transpose(1, 2).flatten(2)
        return torch.tanh(0.5 * nn.functional.linear(joined, weight, self.out.bias) + x)


class TestInASolve:
    x = normal(0, 3, 5, 6)

    def make(self, p: float = 0.3) -> DEQ:
        torch.manual_seed(0)
        return DEQ(Attention(p), stopping=TIGHT, adjoint=Implicit(stopping=TIGHT))

    def test_shapes_of_the_masks(self) -> None:
        _, attention, hidden, weight = Attention(0.3).prepare(self.x)
        assert attention.shape == (3, 2, 5, 5)
        assert hidden.shape == (3, 2, 1, 3)
        assert 0 < (weight == 0).sum() < weight.numel()

    def test_has_a_fixed_point_that_is_another_one_each_time(self) -> None:
        deq = self.make()
        first, second = deq(self.x), deq(self.x)
        assert first.stats.converged.all()
        assert second.stats.converged.all()
        assert not torch.allclose(first.z, second.z, rtol=1e-2)
        picard = DEQ(deq.block, solver=Picard(), stopping=TIGHT)
        torch.manual_seed(5)
        again = picard(self.x).z
        torch.manual_seed(5)
        assert torch.allclose(deq(self.x).z, again, rtol=1e-9, atol=1e-11)

    def test_nothing_is_dropped_in_evaluation(self) -> None:
        deq = self.make().eval()
        block = Attention(0.0)
        block.load_state_dict(deq.block.state_dict())
        assert torch.equal(deq(self.x).z, DEQ(block, stopping=TIGHT)(self.x).z)

    def test_backward_pass_sees_the_masks_of_its_solve(self) -> None:
        """Also when another solve has drawn new ones in between: the gradients are those of these masks, by hand."""
        deq = self.make()
        parameters = list(deq.parameters())
        torch.manual_seed(1)
        z = deq(self.x).z
        deq(self.x)
        found = torch.autograd.grad(z.square().sum(), parameters)
        torch.manual_seed(1)
        args = deq.block.prepare(self.x)  # pyright: ignore[reportCallIssue]
        unrolled = torch.zeros_like(self.x)
        for _ in range(80):
            unrolled = deq.block(unrolled, *args)
        expected = torch.autograd.grad(unrolled.square().sum(), parameters)
        assert torch.allclose(z, unrolled, rtol=1e-10)
        for a, b in zip(found, expected, strict=True):
            assert torch.allclose(a, b, rtol=1e-8, atol=1e-10)

    def test_checkpointing_draws_the_same_masks_again(self) -> None:
        deq = self.make()
        parameters = list(deq.parameters())
        torch.manual_seed(1)
        expected = torch.autograd.grad(deq(self.x).z.square().sum(), parameters)
        torch.manual_seed(1)
        z: Any = checkpoint(lambda x: deq(x).z, self.x, use_reentrant=False)
        torch.rand(7)
        for a, b in zip(torch.autograd.grad(z.square().sum(), parameters), expected, strict=True):
            assert torch.equal(a, b)

    def test_attention_keeps_its_expectation(self) -> None:
        """The mean over masks of P ∘ M V is P V, within five standard errors."""
        torch.manual_seed(0)
        block, z, n = Attention(0.3), self.x, 4000
        with torch.no_grad():
            expected = block.attend(z, None)
            draws = torch.stack([block.attend(z, block.on_attention.mask(z, (3, 2, 5, 5))) for _ in range(n)])
        error = (draws.mean(0) - expected).abs()
        assert (error < 5 * draws.std(0) / math.sqrt(n)).all()
        assert draws.std(0).max() > 0.1

    def test_hidden_units_are_dropped_for_all_positions(self) -> None:
        """A unit is zero at each of the positions of a sample or at none."""
        drop = FrozenDropout(0.5, shared_dims=(1,))
        torch.manual_seed(0)
        hidden = drop(torch.ones(8, 10, 16), drop.mask(torch.ones(8, 10, 16)))
        zeros = (hidden == 0).sum(1)
        assert set(zeros.unique().tolist()) == {0, 10}
        assert not torch.equal(hidden[0], hidden[1])
