"""Attention with relative positions (Transformer-XL), without a copy for the relative shift.

L queries look at K = M + L keys: M columns of memory, then the L positions themselves. Query i stands at column M + i,
so the distance from query i to key j is M + i - j: 0 for itself, positive for what came before.

Source: Dai et al., "Transformer-XL: Attentive Language Models beyond a Fixed-Length Context", 2019, section 3.3 and
appendix B.

    scores[i, j] = (q_i + b_w) . k_j + (q_i + b_r) . r[M + i - j]

The second term is computed for all distances and then shifted row by row. With one distance more than needed, K..0,
the shifted matrix is a view: a row of the product has K + 1 entries, so reading the flat product in rows of K, from
entry L on, moves each row by one against the row before it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from equilibria.kernels.relative_attention import relative_attention as relative_attention
from equilibria.kernels.relative_attention.reference import relative_shift as relative_shift


def sinusoidal_frequencies(width: int, *, like: Tensor | None = None) -> Tensor:
    """(width / 2,): w_i = 10000^(-2i / width), with the dtype and device of `like`. `width` must be even, else ValueError.

    >>> sinusoidal_frequencies(4)
    tensor([1.0000, 0.0100])
    """
    if width % 2:
        raise ValueError(f"width is {width}; sinusoidal positions need an even width, half sines and half cosines")
    like = torch.empty(0) if like is None else like
    return 10000.0 ** -(torch.arange(0, width, 2, dtype=like.dtype, device=like.device) / width)


def sinusoidal_positions(distances: Tensor, width: int, frequencies: Tensor | None = None) -> Tensor:
    """(N, width): [sin(t w), cos(t w)] of the distances t (N,), with the frequencies w, or those of the width.

    Sines first, cosines after them, not interleaved. `width` must be even, otherwise ValueError.

    >>> sinusoidal_positions(torch.arange(8.0), 16).shape
    torch.Size([8, 16])
    """
    if frequencies is None:
        frequencies = sinusoidal_frequencies(width, like=distances)
    angles = distances[:, None] * frequencies.to(distances.dtype)
    return torch.cat((angles.sin(), angles.cos()), dim=-1)


def relative_mask(
    length: int, memory: int, window: int | None = None, padding: Tensor | None = None, *, like: Tensor
) -> Tensor | None:
    """What to add to the (L, K + 1) product before `relative_shift`: 0 where query i sees key j, else -inf.

    Query i sees 0 <= distance, and distance < window where a window is given. None if every query sees every key.
    With `padding` it is (B, L, K + 1): a query that is padding sees itself alone, for it has to see something.

    Args:
        length: L, number of queries.
        memory: M, number of keys before the first query.
        window: how many positions a query sees, itself included; None for no limit. At least 1, otherwise ValueError.
        padding: (B,) how many of the first keys of each sample no other position sees; None for none.
        like: gives dtype and device.

    >>> relative_mask(2, 0, like=torch.zeros(1))  # the first row of the shifted matrix is columns 2.. : [0, -inf]
    tensor([[0., 0., 0.],
            [-inf, 0., 0.]])
    """
    if window is not None and window < 1:
        raise ValueError(f"window is {window}; a position must at least see itself: give 1 or more, or None")
    if padding is None and length == 1 and (window is None or memory < window):
        return None
    columns = length + memory
    queries = torch.arange(memory, columns, device=like.device)[:, None]
    distance = queries - torch.arange(columns, device=like.device)  # (L, K)
    hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
    if padding is not None:
        keys = torch.arange(columns, device=like.device)
        hidden = hidden | ((keys < padding[:, None, None]) & (distance != 0))  # (B, L, K)
    shifted = torch.zeros(hidden.shape, dtype=like.dtype, device=like.device).masked_fill_(hidden, -math.inf)
    # The shift drops the first L entries and reads on from there; undo it by putting L entries in front.
    flat = torch.cat((shifted.new_zeros(*shifted.shape[:-2], length), shifted.flatten(-2)), dim=-1)
    return flat.unflatten(-1, (length, columns + 1))
