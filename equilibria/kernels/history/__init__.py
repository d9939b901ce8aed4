"""Products with a history of differences and sums over it: one pass over the history each.

A history is (B, m, D): m differences for each sample, with any strides, in any floating dtype. It may be stored in fewer
bits (bfloat16) than the vectors: products and sums are taken in the dtype of the vectors, float32 or float64, and the
history never stands in memory in that dtype. The kernels have no derivative: where anything is recorded, or a torch.func
transform or forward mode runs, the reference does the work. With the kernels, a sample's numbers are the same to the bit in
any batch, and on every run.
"""

from __future__ import annotations

from torch import Tensor

from equilibria.kernels.choice import fused_unrecorded
from equilibria.kernels.history import reference

__all__ = ["both_dots", "combine", "dots", "store_dots"]


def dots(history: Tensor, v: Tensor) -> Tensor:
    """(B, m, D), (B, D) -> (B, m): v times every row, in the dtype of v.

    >>> import torch
    >>> dots(torch.ones(1, 2, 3), torch.ones(1, 3))
    tensor([[3., 3.]])
    """
    if fused_unrecorded(history, v):
        from equilibria.kernels.history import triton

        return triton.dots(history, v)
    return reference.dots(history, v)


def both_dots(history: Tensor, v: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """`dots` of two vectors (B, D), in one pass over the history.

    >>> import torch
    >>> both_dots(torch.ones(1, 2, 3), torch.ones(1, 3), torch.zeros(1, 3))
    (tensor([[3., 3.]]), tensor([[0., 0.]]))
    """
    if fused_unrecorded(history, v, w):
        from equilibria.kernels.history import triton

        return triton.both_dots(history, v, w)
    return reference.both_dots(history, v, w)


def combine(base: Tensor, weights: Tensor, history: Tensor) -> Tensor:
    """(B, D), (B, m), (B, m, D) -> (B, D): base - Σ weightsᵢ historyᵢ, summed in the dtype of the weights.

    It is returned in the dtype of base, rounded once.

    >>> import torch
    >>> combine(torch.ones(1, 3), torch.ones(1, 2), torch.ones(1, 2, 3))
    tensor([[-1., -1., -1.]])
    """
    if fused_unrecorded(base, weights, history):
        from equilibria.kernels.history import triton

        return triton.combine(base, weights, history)
    return reference.combine(base, weights, history)


def store_dots(history: Tensor, age: int | Tensor, new: Tensor, old: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Store new - old (B, D) as pair `age` of a ring buffer (B, m, D), in the pass that takes two rows of products.

    These are the products (B, used) of v, and of the pair itself, with all pairs then in use. Pair `age`, counted from 0,
    lies in slot age mod m. The difference is taken in the dtype of v and rounded to that of the history, and what is stored
    is what is multiplied. Slots not in use are not read, unless the age is a tensor. The history is written to, and
    returned; where autograd records or one graph holds the solve, a copy is returned instead.

    >>> import torch
    >>> one = torch.ones(1, 3)
    >>> history, of_one, of_itself = store_dots(torch.empty(1, 4, 3), 0, 2 * one, 0 * one, one)
    >>> of_one, of_itself
    (tensor([[6.]]), tensor([[12.]]))
    """
    if isinstance(age, int) and fused_unrecorded(history, new, old, v):
        from equilibria.kernels.history import triton

        return triton.store_dots(history, age, new, old, v)
    return reference.store_dots(history, age, new, old, v)
