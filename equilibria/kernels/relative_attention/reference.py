"""Attention with relative positions, in plain PyTorch: differentiable any number of times, in both modes, under vmap."""

from __future__ import annotations

import torch
from torch import Tensor


def relative_shift(product: Tensor) -> Tensor:
    """(..., L, K + 1) with column c for distance K - c  ->  (..., L, K) with column j for distance K - L + i - j.

    A view where the last two dimensions of `product` are contiguous. Entries with j > i + K - L (keys that come after
    the query) hold numbers of other rows and must be masked.

    >>> relative_shift(torch.arange(6.0).view(2, 3))  # L = 2, K = 2: row i starts at column L - i
    tensor([[2., 3.],
            [4., 5.]])
    """
    length, width = product.shape[-2:]
    return product.flatten(-2)[..., length:].unflatten(-1, (length, width - 1))


def relative_attention(
    content_query: Tensor,
    position_query: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    mask: Tensor | None,
    dropout_mask: Tensor | None = None,
) -> Tensor:
    heads, batch, length, _ = content_query.shape
    columns = keys.shape[2]
    queries = position_query.flatten(1, 2)  # (H, B L, e)
    if mask is None:
        product = torch.bmm(queries, positions)  # (H, B L, K + 1)
    else:
        # Added by the matrix product itself: a separate pass over the scores would cost as much as the softmax.
        rows = mask.expand(batch, -1, -1).reshape(batch * length, columns + 1)
        product = torch.baddbmm(rows.expand(heads, -1, -1), queries, positions)
    shifted = relative_shift(product.reshape(heads * batch, length, columns + 1))  # (H B, L, K)
    scores = torch.baddbmm(shifted, content_query.flatten(0, 1), keys.flatten(0, 1).transpose(1, 2))
    weights = scores.softmax(dim=-1)
    if dropout_mask is not None:
        weights = (weights.unflatten(0, (heads, batch)) * dropout_mask.transpose(0, 1)).flatten(0, 1)
    return torch.bmm(weights, values.flatten(0, 1)).unflatten(0, (heads, batch))
