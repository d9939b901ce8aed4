"""What the tests of both language models, and of both blocks, do alike."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from equilibria import Stopping, fixed_point
from equilibria.models.language_model import EquilibriumLM

TIGHT = Stopping(rtol=1e-12, atol=0.0, max_evals=300)
V = 11


def text(length: int = 9, batch: int = 3) -> tuple[Tensor, Tensor]:
    """Tokens (B, L) out of V, and the ones that follow."""
    torch.manual_seed(2)
    tokens = torch.randint(V, (batch, length + 1))
    return tokens[:, :-1], tokens[:, 1:]


def gradients(model: EquilibriumLM, *inputs: Any, **options: Any) -> list[Tensor]:
    """Of the summed loss, in every parameter."""
    return list(torch.autograd.grad(model(*inputs, **options).nll.sum(), list(model.parameters())))


def assert_same_gradients(ours: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(ours, expected, strict=True):
        assert (a - b).norm() <= 1e-6 * b.norm() + 1e-12


def assert_compactible(block: Any, u: Tensor, args: tuple[Any, ...], z: Tensor) -> Tensor:
    """Rows of the args, taken as `batch_dims` says, give the rows of f, and the compacted equilibrium is the whole one."""
    rows = torch.tensor([4, 1])

    def of_rows(arg: Any, dim: int | None) -> Any:
        return tree_map(lambda x: x if dim is None or x is None else x.index_select(dim, rows), arg)

    small = [of_rows(arg, dim) for arg, dim in zip(args, block.batch_dims, strict=True)]
    torch.testing.assert_close(block(z[rows], *small), block(z, *args)[rows], rtol=1e-12, atol=1e-13)
    whole = fixed_point(block, block.initial(u), *args, stopping=TIGHT)
    compacted = fixed_point(block, block.initial(u), *args, stopping=TIGHT, batch_dims=block.batch_dims)
    torch.testing.assert_close(compacted.z, whole.z, rtol=1e-9, atol=1e-10)
    return whole.z
