"""Products with a Jacobian from reverse passes alone, for forward modes do not nest inside one another."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def linearize(f: Callable[..., Tensor], *primals: Tensor) -> tuple[Tensor, Callable[..., Tensor]]:
    """f(*primals), and the map of tangents to J · tangents, where J is the Jacobian of f at the primals.

    The pullback w -> wᵀJ is linear in w, so that its own pullback is J. f is evaluated once; each product is one pass
    backward over the record of the pullback, and can itself be differentiated.

    >>> value, push = linearize(torch.sin, torch.zeros(2))
    >>> push(torch.ones(2))
    tensor([1., 1.])
    """
    value, pullback, *_ = torch.func.vjp(f, *primals)
    push = torch.func.vjp(pullback, torch.zeros_like(value))[1]
    return value, lambda *tangents: push(tangents)[0]
