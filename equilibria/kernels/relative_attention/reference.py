"""Attention with relative positions, in plain PyTorch: differentiable any number of times, in both modes, under vmap."""

from __future__ import annotations

import torch
from torch import Tensor


def relative_attention(
    content_query: Tensor,
    position_query: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    mask: Tensor | None,
    dropout_mask: Tensor | None = None,
) -> Tensor:
    length, columns = content_query.shape[2], keys.shape[2]
    product = torch.einsum("hble,hek->hblk", position_query, positions)  # column c stands for distance K - c
    if mask is not None:
        product = product + mask
    # Row i starts at column L - i: read in rows of K from entry L on, each row moves by one against the one before it.
    shifted = product.flatten(2)[..., length:].unflatten(2, (length, columns))
    weights = (content_query @ keys.mT + shifted).softmax(dim=-1)  # (H, B, L, K)
    if dropout_mask is not None:
        weights = weights * dropout_mask.transpose(0, 1)
    return weights @ values
