"""The explicit twin of an equilibrium: the same block, a fixed number of times, weights tied."""

from __future__ import annotations

from typing import Any

from torch import nn

from equilibria.nn.computed_once import computed_once
from equilibria.nn.deq import initial, prepared


def stack(block: nn.Module, depth: int, *inputs: Any) -> Any:
    """z_depth of z_{k+1} = block(z_k, *args), with args and z_0 as `DEQ(block)` would have them.

    What stays the same from layer to layer is computed once, as for the equilibrium: what `prepare` makes, and parametrised
    tensors (weight norm, spectral norm). Gradients are those of plain autograd. As depth grows, z_depth tends to the fixed
    point, where the iteration converges at all.

    Args:
        block: a module that `DEQ` takes: `forward(z, *args)`, and optionally `prepare` and `initial`.
        depth: number of applications, at least 1, otherwise ValueError.

    >>> import torch
    >>> class Cell(nn.Module):
    ...     def forward(self, z, x):
    ...         return 0.5 * z + x
    >>> stack(Cell(), 3, torch.ones(1, 1))
    tensor([[1.7500]])
    """
    if depth < 1:
        raise ValueError(f"depth is {depth}; a stack needs at least 1 layer")
    with computed_once(block):
        args = prepared(block, *inputs)
        z = initial(block, *inputs)
        for _ in range(depth):
            z = block(z, *args)
    return z
