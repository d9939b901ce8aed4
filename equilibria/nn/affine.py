"""x Wᵀ + b by the fastest product that the machine has for float32.

PyTorch multiplies float32 matrices on the CPU with MKL, which on processors of other makers than Intel leaves their
512-bit instructions unused. oneDNN, which comes with PyTorch too, uses them: 245 against 115 GFLOP/s on one core of an AMD
EPYC. PyTorch's own door to it, the operator that compiled graphs call for a linear map, has no derivatives; here it has.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
    y = _Affine.apply(rows, weight, bias) if torch.is_grad_enabled() else _product(rows, weight, bias)
    return y.unflatten(0, x.shape[:-1])  # type: ignore[union-attr]


def affine_relu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """max(x Wᵀ + b, 0), (..., k) -> (..., n), with weight (n, k) and bias (n,).

    >>> affine_relu(torch.ones(2, 3), torch.ones(2, 3), torch.tensor([4.0, -4.0]))[0]
    tensor([7., 0.])
    """
    if not _suits(x, weight):
        return F.linear(x, weight, bias).relu_()
    rows = x.flatten(0, -2)
    y = _AffineRelu.apply(rows, weight, bias) if torch.is_grad_enabled() else _product(rows, weight, bias, "relu")
    return y.unflatten(0, x.shape[:-1])  # type: ignore[union-attr]


def _suits(x: Tensor, weight: Tensor) -> bool:
    return (
        _has_wide_products()
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and x.numel() * len(weight) >= SMALLEST
        and type(x) is Tensor
        and type(weight) in (Tensor, nn.Parameter)
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and reverse_alone()
        and bool(torch.backends.mkldnn.enabled)
    )


@cache
def _has_wide_products() -> bool:
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return wide and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None, then: str = "none") -> Tensor:
    multiply: Any = torch.ops.mkldnn._linear_pointwise
    if bias is not None and bias.dim() == 2:
        return multiply.binary(x, bias, weight, None, "add")
    return multiply.default(x, weight, bias, then, [], "")


class _Affine(torch.autograd.Function):
    """(N, k), (n, k), and (n,), (N, n) or None -> (N, n). The backward pass is made of such products."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.shared_bias = bias is not None and bias.dim() == 1
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _pulled(ctx, *ctx.saved_tensors, *gradients)


class _AffineRelu(torch.autograd.Function):
    """The same with a relu after it and a bias (n,), without another pass over the result."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = _product(x, weight, bias, "relu")
        ctx.save_for_backward(x, weight, y)
        ctx.shared_bias = True
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = gradients
        x, weight, y = ctx.saved_tensors
        return _pulled(ctx, x, weight, g, y)


def _pulled(ctx: Any, x: Tensor, weight: Tensor, g: Tensor, relu: Tensor | None = None) -> tuple[Tensor | None, ...]:
    """The gradients of x, weight and bias, as far as they are asked for; `relu` is the result where a relu made it."""
    wants = [_asked_for(ctx, i) for i in range(3)]

    def pull(g: Tensor) -> list[Tensor]:
        if relu is not None:
            g = torch.ops.aten.threshold_backward(g, relu, 0)
        parts = (
            lambda: affine(g, weight.t()),
            lambda: affine(g.t(), x.t()),
            lambda: g.sum(0) if ctx.shared_bias else g,
        )
        return [part() for part, want in zip(parts, wants, strict=True) if want]

    found = iter(through_old_vmap(pull, g))
    return tuple(next(found) if want else None for want in wants)


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
