"""Dropout whose mask is drawn once per solve, so that the map still has a fixed point."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class FrozenDropout(nn.Module):
    """Dropout with a mask that is drawn first and applied later, as often as needed (variational dropout).

        mask_i ~ Bernoulli(1 - p) / (1 - p),    forward(x, mask) = x * mask

    A map that draws new random numbers at each call has no fixed point. Draw the mask in `prepare`, pass it to f as an
    argument, and every evaluation of the solve and of its backward pass sees the same one.

    Args:
        p: probability that an entry is zeroed, 0 <= p < 1.
        shared_dims: dimensions along which one draw is shared, e.g. 1 to give all positions of a (B, L, d) tensor the
            same mask, of shape (B, 1, d).

    Raises:
        ValueError: p is outside [0, 1).

    Source: Gal & Ghahramani, "A Theoretically Grounded Application of Dropout in Recurrent Neural Networks", 2016.

    >>> import torch
    >>> drop, x = FrozenDropout(0.5, shared_dims=(1,)), torch.ones(2, 5, 3)
    >>> mask = drop.mask(x)
    >>> drop(x, mask).shape, mask.shape
    (torch.Size([2, 5, 3]), torch.Size([2, 1, 3]))
    """

    def __init__(self, p: float, shared_dims: Sequence[int] = ()) -> None:
        super().__init__()
        if not 0.0 <= p < 1.0:
            raise ValueError(f"p is {p}; the probability of dropping an entry must be at least 0 and below 1")
        self.p = p
        self.shared_dims = tuple(shared_dims)

    def mask(self, like: Tensor) -> Tensor | None:
        """A mask for tensors shaped, typed and placed as `like`, of size 1 along `shared_dims`.

        None where nothing is to be dropped: in evaluation mode, or if p is 0.
        """
        if not self.training or self.p == 0.0:
            return None
        shape = list(like.shape)
        for dim in self.shared_dims:
            if not -len(shape) <= dim < len(shape):
                raise ValueError(f"shared_dims holds {dim}, but the tensor has shape {tuple(shape)}")
            shape[dim] = 1
        return like.new_empty(shape).bernoulli_(1.0 - self.p).div_(1.0 - self.p)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return x if mask is None else x * mask

    def extra_repr(self) -> str:
        return f"p={self.p}, shared_dims={self.shared_dims}"
