"""Inputs of relative attention, and the attention written out query by query."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

F64 = torch.float64


class Sizes(NamedTuple):
    length: int
    memory: int
    heads: int = 2
    batch: int = 2
    width: int = 5
    window: int | None = None
    padding: tuple[int, ...] | None = None
    dropout: bool = False


SIZES = [
    Sizes(1, 0, heads=1, batch=1, width=1),
    Sizes(1, 6),
    Sizes(1, 40, window=9),
    Sizes(5, 0),
    Sizes(7, 12, width=8, dropout=True),
    Sizes(18, 3, heads=3, batch=1, width=17),
    Sizes(35, 2, batch=1, window=4),
    Sizes(4, 33, heads=1, window=20, padding=(0, 30)),
    Sizes(17, 16, padding=(3, 33), dropout=True),
]


def inputs(sizes: Sizes, dtype: torch.dtype = F64, device: torch.device | str = "cpu") -> list[Tensor]:
    """content_query, position_query, keys, values and positions, which require grad.

    The position of distance K, which no query sees, is NaN.
    """
    torch.manual_seed(0)
    heads, batch, length, width = sizes.heads, sizes.batch, sizes.length, sizes.width
    columns = length + sizes.memory
    shapes = [(heads, batch, rows, width) for rows in (length, length, columns, columns)]
    made = [torch.randn(shape, dtype=F64) / width**0.25 for shape in (*shapes, (heads, width, columns + 1))]
    made[4][..., 0] = torch.nan
    return [t.to(device, dtype).requires_grad_() for t in made]


def attend(
    function: Callable[..., Tensor], tensors: Sequence[Tensor], mask: Tensor | None, drop: Tensor | None = None
) -> Tensor:
    return function(*tensors, mask, drop)


def seen(sizes: Sizes, sample: int, i: int) -> list[int]:
    """Which keys a query sees."""
    here = sizes.memory + i
    first = 0 if sizes.window is None else max(0, here - sizes.window + 1)
    padded = 0 if sizes.padding is None else sizes.padding[sample]
    return [j for j in range(first, here + 1) if j >= padded or j == here]


def masks(sizes: Sizes, device: torch.device | str = "cpu") -> tuple[Tensor | None, Tensor | None]:
    """The mask before the shift, with NaN where no query has a key, and the mask of dropout."""
    length, columns = sizes.length, sizes.length + sizes.memory
    shifted = torch.full((sizes.batch, length, columns), -math.inf)
    for b in range(sizes.batch):
        for i in range(length):
            shifted[b, i, seen(sizes, b, i)] = 0.0
    mask = torch.full((sizes.batch, length * (columns + 1)), torch.nan)
    mask[:, length:] = shifted.flatten(1)
    mask = mask.view(sizes.batch, length, columns + 1).to(device)
    drop = (torch.rand(sizes.batch, sizes.heads, length, columns) < 0.7).float().to(device) / 0.7
    if length == 1 and sizes.window is None and sizes.padding is None:
        mask = None
    elif sizes.padding is None:
        mask = mask[0]
    return mask, drop if sizes.dropout else None


def by_loops(sizes: Sizes, tensors: Sequence[Tensor], drop: Tensor | None) -> Tensor:
    """Attention as it is defined, in float64."""
    q, p, k, v, r = (t.to(F64) for t in tensors)
    columns = sizes.length + sizes.memory
    out = []
    for h in range(sizes.heads):
        for b in range(sizes.batch):
            for i in range(sizes.length):
                j = torch.tensor(seen(sizes, b, i), device=q.device)
                distance = sizes.memory + i - j
                scores = k[h, b, j] @ q[h, b, i] + p[h, b, i] @ r[h][:, columns - distance]
                weights = scores.softmax(0)
                if drop is not None:
                    weights = weights * drop[b, h, i, j].to(F64)
                out.append(weights @ v[h, b, j])
    return torch.stack(out).view(q.shape)
