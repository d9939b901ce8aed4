"""Jacobian regularisation: a penalty on the size of ∂f/∂z at the fixed point."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def jacobian_loss(f: Callable[..., Tensor], z: Tensor, *args: Any, generator: torch.Generator | None = None) -> Tensor:
    """Hutchinson's estimate of ‖J‖²_F / n, with J = ∂f/∂z at z and n the size of z: mean of (vᵀJ)², v ~ N(0, I).

    The spectral radius of J is at most ‖J‖_F; keeping it down keeps solves short and stable while f is trained. Gradients
    flow to args and to what f owns; the point z itself is taken as constant. Costs one evaluation of f, one
    vector-Jacobian product, and the derivative of both in the backward pass; adding it on a random third of the steps
    serves as well.

    Args:
        f: the map, f(z, *args) -> (B, ...).
        z: (B, ...), the fixed point.
        args: the other arguments of f.
        generator: source of v, on the device of z.

    Returns:
        A scalar, 0-dimensional.

    Source: Bai, Koltun and Kolter 2021, "Stabilizing equilibrium models by Jacobian regularization", section 4.

    >>> z = torch.randn(2, 3)
    >>> float(jacobian_loss(lambda z, a: a * z.sum(1, keepdim=True).expand(-1, 3), z, torch.zeros(()))) == 0.0
    True
    """
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        output = f(z, *args)
        v = torch.randn(z.shape, dtype=z.dtype, device=z.device, generator=generator)
        (product,) = torch.autograd.grad(output, z, v, create_graph=True)
    return product.square().mean()
