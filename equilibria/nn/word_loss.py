"""-log softmax(W h + b) of one word per position, without the logits of all positions at once.

For N positions and V words the logits, their softmax and the gradients of both are four arrays of N V numbers, the largest
of a training step by far. Here a part of them is taken at a time and computed once more in the backward pass: that costs a
fourth matrix product and saves the memory, and with it the time that a CPU needs to get large arrays from the system and to
run through them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from equilibria.nn.affine import affine
from equilibria.transforms import reverse_alone, through_old_vmap

_LOG2_E = math.log2(math.e)

LOGITS = 2**20
"""Logits that are held at a time: 4 MiB in float32, which a CPU holds in its cache."""


def word_loss(hidden: Tensor, weight: Tensor, bias: Tensor, ids: Tensor) -> Tensor:
    """-log softmax(W h + b)[id], (N,), of hidden (N, d), weight (V, d), bias (V,) and ids (N,); in float32 at least.

    As `F.cross_entropy(F.linear(hidden, weight, bias), ids, reduction="none")` with all its derivatives, to rounding.

    >>> hidden, weight = torch.zeros(3, 2), torch.zeros(4, 2)
    >>> word_loss(hidden, weight, torch.zeros(4), torch.tensor([0, 1, 3])).exp()
    tensor([4., 4., 4.])
    """
    if not _suits(hidden, weight):
        return _plain(hidden, weight, bias, ids)
    if torch.is_grad_enabled():  # its forward pass records nothing
        return _WordLoss.apply(hidden, weight, bias, ids)  # type: ignore[return-value]
    return _forward(hidden, weight, bias, ids)


def _suits(hidden: Tensor, weight: Tensor) -> bool:
    return (
        len(hidden) * len(weight) > LOGITS
        and hidden.dtype == weight.dtype
        and hidden.dtype in (torch.float32, torch.float64)
        and type(hidden) is Tensor
        and type(weight) in (Tensor, nn.Parameter)
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled(hidden.device.type)
        and reverse_alone()
    )


def _plain(hidden: Tensor, weight: Tensor, bias: Tensor, ids: Tensor) -> Tensor:
    logits = affine(hidden, weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, ids, reduction="none")


def _forward(hidden: Tensor, weight: Tensor, bias: Tensor, ids: Tensor) -> Tensor:
    """By positions: each sees all words."""
    rows = max(1, LOGITS // len(weight))
    parts = []
    for h, i in zip(hidden.split(rows), ids.split(rows), strict=True):
        logits = affine(h, weight, bias)
        torch.log_softmax(logits, -1, out=logits)
        parts.append(logits.gather(1, i.unsqueeze(1)).squeeze(1))
    return torch.cat(parts).neg_()


class _WordLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor, ids: Tensor) -> Tensor:
        loss = _forward(hidden, weight, bias, ids)
        ctx.save_for_backward(hidden, weight, bias, ids, loss)
        return loss

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = gradients
        hidden, weight, bias, ids, loss = ctx.saved_tensors

        def pull(g: Tensor) -> tuple[Tensor, ...]:
            if torch.is_grad_enabled() or not reverse_alone():  # differentiated again, or batched
                pullback = torch.func.vjp(lambda h, w, b: _plain(h, w, b, ids), hidden, weight, bias)[1]
                return pullback(g)
            return _backward(hidden, weight, bias, ids, loss, g)

        return (*through_old_vmap(pull, g), None)


def _backward(
    hidden: Tensor, weight: Tensor, bias: Tensor, ids: Tensor, loss: Tensor, g: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of hidden, weight and bias, with E = softmax(W h + b) - onehot(id): of a few words at a time, so that
    each row of W gets its gradient once.

    The logarithm of the softmax's sum is what the loss adds to the logit of its word. Powers of two, for torch.exp takes
    a CPU four times as long.
    """
    chosen = torch.linalg.vecdot(hidden, weight[ids]) + bias[ids]
    log_sum = (loss + chosen) * _LOG2_E
    # Of hidden the transpose: Wᵀ E takes a CPU three quarters of the time of Eᵀ W, where E would be turned round.
    of_hidden = torch.zeros_like(hidden.t(), memory_format=torch.contiguous_format)
    of_weight, of_bias = torch.empty_like(weight), torch.empty_like(bias)
    exponent, weighted = hidden * _LOG2_E, hidden * g.unsqueeze(1)
    count = max(1, LOGITS // len(hidden))
    for first in range(0, len(weight), count):
        words = slice(first, first + count)
        error = affine(weight[words], exponent, -log_sum)  # (words, N)
        error += (bias[words] * _LOG2_E).unsqueeze(1)
        error.exp2_()
        here = ((ids >= first) & (ids < first + count)).nonzero().squeeze(1)
        error[ids[here] - first, here] -= 1.0
        torch.mv(error, g, out=of_bias[words])
        of_weight[words] = affine(error, weighted.t())
        of_hidden = affine(weight[words].t(), error.t(), of_hidden)
    return (of_hidden * g).t().contiguous(), of_weight, of_bias
