"""Products with a history of differences and sums over it, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from equilibria.kernels.history.ring import in_use, newest, store_difference


def dots(history: Tensor, v: Tensor) -> Tensor:
    """(B, m, D), (B, D) -> (B, m): v times every row, in the dtype of v.

    As v Hᵀ, which a CPU does several times faster than H v. A history stored in fewer bits is read row by row, so that it
    never stands in memory in more.
    """
    if history.dtype != v.dtype:
        return torch.stack([torch.linalg.vecdot(row.to(v.dtype), v) for row in history.unbind(1)], dim=1)
    return torch.bmm(v.unsqueeze(1), history.mT).squeeze(1)


def both_dots(history: Tensor, v: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """`dots` of two vectors, in one pass over the rows."""
    if history.dtype != v.dtype:
        return dots(history, v), dots(history, w)
    of_v, of_w = torch.bmm(torch.stack((v, w), dim=1), history.mT).unbind(1)
    return of_v, of_w


def combine(base: Tensor, weights: Tensor, history: Tensor) -> Tensor:
    """(B, D), (B, m), (B, m, D) -> (B, D): base - Σ weightsᵢ historyᵢ, summed in the dtype of the weights."""
    total = base.to(weights.dtype)
    if history.dtype != weights.dtype:
        for weight, row in zip(weights.unbind(1), history.unbind(1), strict=True):
            total = torch.addcmul(total, weight.unsqueeze(1), row.to(weights.dtype), value=-1)
    else:
        total = torch.baddbmm(total.unsqueeze(1), weights.unsqueeze(1), history, alpha=-1.0).squeeze(1)
    return total.to(base.dtype)


def store_dots(history: Tensor, age: int | Tensor, new: Tensor, old: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """history (B, m, D) with new - old (B, D) as pair `age`; the products (B, used) of v and of that pair with all."""
    history = store_difference(history, age, new, old)
    return history, *both_dots(in_use(history, age + 1), v, newest(history, age).to(v.dtype))
