"""x Wᵀ + b by the fastest product that the machine has for float32: see `equilibria.nn.wide_product`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from equilibria.nn.wide_product import WIDE, product
from equilibria.transforms import reverse_alone, through_old_vmap

SMALLEST = 2**22
"""Multiplications below which a call costs more than it saves."""


def affine(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b, (..., k) -> (..., n), with weight (n, k): `F.linear`, to rounding and in all derivatives.

    bias is (n,), or (..., n) as the result, or None.

    >>> affine(torch.ones(2, 3), torch.ones(4, 3), torch.ones(4))[0]
    tensor([4., 4., 4., 4.])
    """
    if not _suits(x, weight):
        if bias is None or bias.dim() == 1:
            return F.linear(x, weight, bias)
        return torch.addmm(bias.flatten(0, -2), x.flatten(0, -2), weight.t()).unflatten(0, x.shape[:-1])
    rows = x.flatten(0, -2)
    if bias is not None and bias.dim() > 1:
        bias = bias.flatten(0, -2)
    return _multiplied(rows, weight, bias, "none").unflatten(0, x.shape[:-1])


def affine_relu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """max(x Wᵀ + b, 0), (..., k) -> (..., n), with weight (n, k) and bias (n,).

    >>> affine_relu(torch.ones(2, 3), torch.ones(2, 3), torch.tensor([4.0, -4.0]))[0]
    tensor([7., 0.])
    """
    if not _suits(x, weight):
        return F.linear(x, weight, bias).relu_()
    return _multiplied(x.flatten(0, -2), weight, bias, "relu").unflatten(0, x.shape[:-1])


def _suits(x: Tensor, weight: Tensor) -> bool:
    return (
        WIDE
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and x.numel() * len(weight) >= SMALLEST
        and type(x) is Tensor
        and type(weight) in (Tensor, nn.Parameter)
        and not torch.is_autocast_enabled("cpu")
        and bool(torch.backends.mkldnn.enabled)
        and _in_reverse_alone()
    )


def _in_reverse_alone() -> bool:
    if not torch.compiler.is_compiling():
        return reverse_alone()
    from equilibria.nn.affine_in_graph import suits

    return suits()


def _multiplied(x: Tensor, weight: Tensor, bias: Tensor | None, then: str) -> Tensor:
    if torch.compiler.is_compiling():
        from equilibria.nn.affine_in_graph import multiplied

        return multiplied(x, weight, bias, then)
    if torch.is_grad_enabled():
        return _Affine.apply(x, weight, bias, then)  # type: ignore[return-value]
    return product(x, weight, bias, then)


class _Affine(torch.autograd.Function):
    """The backward pass is made of such products too, and a relu takes no further pass over the result."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, then: str) -> Tensor:
        y = product(x, weight, bias, then)
        ctx.save_for_backward(x, weight, *([y] if then == "relu" else []))
        ctx.shared_bias = bias is not None and bias.dim() == 1
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *relu = ctx.saved_tensors
        wants = [_asked_for(ctx, i) for i in range(3)]

        def pull(g: Tensor) -> list[Tensor]:
            if relu:
                g = torch.ops.aten.threshold_backward(g, relu[0], 0)
            parts = (
                lambda: affine(g, weight.t()),
                lambda: affine(g.t(), x.t()),
                lambda: g.sum(0) if ctx.shared_bias else g,
            )
            return [part() for part, want in zip(parts, wants, strict=True) if want]

        found = iter(through_old_vmap(pull, gradients[0]))
        return (*(next(found) if want else None for want in wants), None)


def _asked_for(ctx: Any, i: int) -> bool:
    """Whether this backward pass asks for the gradient of input i: the products of a solve want none of the weights'.

    A Function is told which inputs have gradients at all, not which of them are on the way to what was asked for.
    """
    if not ctx.needs_input_grad[i]:
        return False
    try:
        return torch._C._will_engine_execute_node(ctx.next_functions[i][0])
    except RuntimeError:  # of a leaf that torch.autograd.grad was asked for
        return True
