"""The room for a history: pair number `age`, counted from 0, lies in slot age mod m. Only this file knows that.

Where the age is a tensor, its value is not known and all slots are looked at: those not in use hold zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

from equilibria.stopping import work_dtype
from equilibria.transforms import blind, recorded


def ring(g: Tensor, history: int, dtype: torch.dtype | None = None) -> Tensor:
    """Room for `history` differences like g (B, D), not touched before it is needed, unless all slots will be looked at."""
    shape = (g.shape[0], history, g.shape[1])
    return g.new_zeros(shape, dtype=dtype) if blind() else g.new_empty(shape, dtype=dtype)


def store_difference(history: Tensor, age: int | Tensor, new: Tensor, old: Tensor) -> Tensor:
    """history (B, m, D) with new - old (B, D) as pair `age`: in place, or as a copy where autograd records the solve
    or one graph holds it.

    The difference is taken in float32 at least and rounded to the dtype of the history.
    """
    dtype = history.dtype
    if not new.dtype == old.dtype == dtype or dtype != work_dtype(dtype):
        dtype = torch.promote_types(work_dtype(new.dtype), work_dtype(dtype))
        new, old = new.to(dtype), old.to(dtype)
    if isinstance(age, Tensor):
        return torch.where(slot_of(history, 1, age), (new - old).to(history.dtype).unsqueeze(1), history)
    slot = age % history.shape[1]
    if recorded(history, new, old):
        stored = (new - old).to(history.dtype).unsqueeze(1)
        return history.index_copy(1, torch.tensor([slot], device=history.device), stored)
    if history.dtype == dtype:
        torch.sub(new, old, out=history[:, slot])
    else:
        history[:, slot] = new - old
    return history


def in_use(buffer: Tensor, age: int | Tensor) -> Tensor:
    """The slots filled once `age` pairs are stored: (B, m, ...) -> (B, min(age, m), ...)."""
    return buffer if isinstance(age, Tensor) else buffer[:, : min(age, buffer.shape[1])]


def newest(history: Tensor, age: int | Tensor) -> Tensor:
    """(B, D): pair `age`."""
    if isinstance(age, Tensor):
        return history.index_select(1, (age % history.shape[1]).reshape(1)).squeeze(1)
    return history[:, age % history.shape[1]]


def slot_of(buffer: Tensor, dim: int, age: Tensor) -> Tensor:
    """Where pair `age` lies along a dimension: a choice fuses with its neighbours in a graph, an indexed copy does not."""
    here = torch.arange(buffer.shape[dim], device=buffer.device) == age % buffer.shape[dim]
    return here.view(-1, *[1] * (buffer.dim() - dim - 1))
