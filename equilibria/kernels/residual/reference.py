"""f(z) - z and the two norms of every step, in plain PyTorch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Residual(NamedTuple):
    """What is known of samples at their z."""

    g: Tensor
    """(B, D) f(z) - z, in float32 at least."""
    norm: Tensor
    """(B,) ‖f(z) - z‖₂, in the dtype of g."""
    scale: Tensor
    """(B,) ‖f(z)‖₂, in the dtype of g."""


def residual(fz: Tensor, z: Tensor) -> Residual:
    dtype = torch.promote_types(z.dtype, torch.float32)
    g = fz.to(dtype) - z.to(dtype)
    norm, scale = (torch.linalg.vector_norm(r.detach(), dim=1, dtype=dtype) for r in (g, fz))
    return Residual(g, norm, scale)
