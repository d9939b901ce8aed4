"""Dropout whose mask is drawn before it is applied: once per solve, so that the map still has a fixed point."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from equilibria.nn.clusters import check_ids


class FrozenDropout(nn.Module):
    """Dropout with a mask that is drawn first and applied later, as often as needed (variational dropout).

        mask_i ~ Bernoulli(1 - p) / (1 - p),    forward(x, mask) = x * mask

    A map that draws new random numbers at each call has no fixed point. Draw the mask in `prepare`, pass it to f as an
    argument, and every evaluation of the solve and of its backward pass sees the same one. The next solve draws another;
    evaluation mode draws none. Masks come from torch's generator, so that checkpointing draws the same ones again.

    What is dropped depends on the shape of the mask:

    - features: `mask(x)`, of the shape of x;
    - hidden units for the whole of a sequence: `shared_dims=(1,)` for x (B, L, d) gives (B, 1, d);
    - attention: `mask(x, (B, H, L, K))` for the probabilities of H heads, multiplied in after the softmax. Outputs stay
      averages of values in expectation, with weights that no longer sum to one in a single draw;
    - weights: `mask(linear.weight)`, or without any code in the block `equilibria.nn.weight_drop`.

    Args:
        p: probability that an entry is zeroed, 0 <= p < 1.
        shared_dims: dimensions along which one draw is shared, e.g. 1 to give all positions of a (B, L, d) tensor the
            same mask, of shape (B, 1, d).

    Raises:
        ValueError: p is outside [0, 1).

    Sources: Srivastava et al., "Dropout", 2014; Gal & Ghahramani, "A Theoretically Grounded Application of Dropout in
    Recurrent Neural Networks", 2016, section 4 (one mask for all positions); Bai, Kolter & Koltun, "Deep Equilibrium
    Models", 2019, appendix (one mask for all evaluations).

    >>> import torch
    >>> drop, x = FrozenDropout(0.5, shared_dims=(1,)), torch.ones(2, 5, 3)
    >>> mask = drop.mask(x)
    >>> drop(x, mask).shape, mask.shape
    (torch.Size([2, 5, 3]), torch.Size([2, 1, 3]))
    >>> drop.mask(x, (2, 4, 5, 5)).shape
    torch.Size([2, 1, 5, 5])
    """

    def __init__(self, p: float, shared_dims: Sequence[int] = ()) -> None:
        super().__init__()
        if not 0.0 <= p < 1.0:
            raise ValueError(f"p is {p}; the probability of dropping an entry must be at least 0 and below 1")
        self.p = p
        self.shared_dims = tuple(shared_dims)

    def mask(self, like: Tensor, shape: Sequence[int] | None = None) -> Tensor | None:
        """A mask for tensors typed and placed as `like`, of its shape or the one given, with size 1 along `shared_dims`.

        None where nothing is to be dropped: in evaluation mode, or if p is 0.
        """
        if not self.training or self.p == 0.0:
            return None
        shape = list(like.shape if shape is None else shape)
        for dim in self.shared_dims:
            if not -len(shape) <= dim < len(shape):
                raise ValueError(f"shared_dims holds {dim}, but the tensor has shape {tuple(shape)}")
            shape[dim] = 1
        return like.new_empty(shape).bernoulli_(1.0 - self.p).div_(1.0 - self.p)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return x if mask is None else x * mask

    def extra_repr(self) -> str:
        return f"p={self.p}, shared_dims={self.shared_dims}"


class WordDropout(nn.Module):
    """Lookup in an embedding table of which whole rows are dropped: a dropped word is zero wherever it occurs.

        mask_w ~ Bernoulli(1 - p) / (1 - p),    forward(weight, ids) = mask[ids] * weight[ids]

    One mask of shape (V, 1) is drawn per call, by `self.drop`; nothing is dropped in evaluation mode.

    Args:
        p: probability that a word is zeroed, 0 <= p < 1.
        freeze_last_row: give no gradient to the last row of the table, also where nothing is dropped. The TrellisNet
            code of 2019 does so by accident: it asks for a padding index of -1, which torch takes as the last word.

    Shapes: weight (V, d), ids (...) of integers -> (..., d).

    Raises:
        ValueError: p is outside [0, 1), or an id outside of the vocabulary.

    Sources: Gal & Ghahramani, "A Theoretically Grounded Application of Dropout in Recurrent Neural Networks", 2016,
    section 4.2; Merity, Keskar & Socher, "Regularizing and Optimizing LSTM Language Models", 2018, section 4.3.

    >>> import torch
    >>> table, drop = nn.Embedding(20, 3), WordDropout(0.4)
    >>> x = drop(table.weight, torch.tensor([[7, 2, 7]]))
    >>> x.shape, torch.equal(x[0, 0], x[0, 2])
    (torch.Size([1, 3, 3]), True)
    """

    def __init__(self, p: float, *, freeze_last_row: bool = False) -> None:
        super().__init__()
        self.drop = FrozenDropout(p, shared_dims=(1,))
        self.freeze_last_row = freeze_last_row

    def forward(self, weight: Tensor, ids: Tensor) -> Tensor:
        check_ids(ids, len(weight))
        mask = self.drop.mask(weight)  # (V, 1)
        vectors = F.embedding(ids, weight, padding_idx=-1 if self.freeze_last_row else None)
        return self.drop(vectors, None if mask is None else mask[ids])

    def extra_repr(self) -> str:
        return f"freeze_last_row={self.freeze_last_row}"
