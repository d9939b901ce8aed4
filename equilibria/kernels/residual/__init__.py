"""f(z) - z with the norms that every step needs, in one pass over f(z) and z."""

from __future__ import annotations

from torch import Tensor

from equilibria.kernels.choice import fused_unrecorded
from equilibria.kernels.residual import reference
from equilibria.kernels.residual.reference import Residual

__all__ = ["Residual", "residual"]


def residual(fz: Tensor, z: Tensor) -> Residual:
    """(B, D), (B, D) -> g = f(z) - z in float32 at least, ‖g‖₂ and ‖f(z)‖₂ (B,). The norms carry no derivative.

    The kernel has no derivative for g either: where anything is recorded, the reference does the work.

    >>> import torch
    >>> residual(torch.ones(1, 4), torch.zeros(1, 4)).norm
    tensor([2.])
    """
    if fused_unrecorded(fz, z):
        from equilibria.kernels.residual import triton

        return triton.residual(fz, z)
    return reference.residual(fz, z)
