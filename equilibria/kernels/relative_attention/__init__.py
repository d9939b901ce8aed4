"""Attention with the relative positions of Transformer-XL, without its (L, K) scores in memory.

Source: Dai et al. 2019, "Transformer-XL", section 3.3; computed tile by tile with a running softmax as in Dao et al. 2022,
"FlashAttention", the relative shift taken inside each tile.
"""

from __future__ import annotations

import torch
from torch import Tensor

from equilibria.kernels.choice import INTERPRETED, fused
from equilibria.kernels.relative_attention import reference

__all__ = ["relative_attention"]

WIDEST = 256
"""Bytes of the widest head of which the tiles fit into the fast memory of a GPU: 128 numbers in bfloat16, 64 in float32."""


def relative_attention(
    content_query: Tensor,
    position_query: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    mask: Tensor | None,
    dropout_mask: Tensor | None = None,
) -> Tensor:
    """(softmax(content_query . keys + shift(position_query . positions) + mask) * dropout_mask) . values

    Query i stands at column M + i of K = M + L keys and sees none after it. The heads come first, so that a product over
    positions, which all samples share, is one matrix product per head. Differentiable any number of times, in reverse and
    forward mode, and under vmap: where kernels run, they give the derivatives of the first order, and PyTorch all others.

    Args:
        content_query: (H, B, L, e), (q + b_w) / sqrt(e); contiguous, to avoid a copy.
        position_query: (H, B, L, e), (q + b_r) / sqrt(e); contiguous, to avoid a copy.
        keys: (H, B, K, e), K >= L.
        values: (H, B, K, e).
        positions: (H, e, K + 1), projected positions of the distances K, K - 1, ..., 0.
        mask: (L, K + 1) or (B, L, K + 1), added to the products of position queries and positions before they are shifted:
            0 or -inf, the latter for every key after the query. None where nothing is hidden, which takes L = 1.
        dropout_mask: (B, H, L, K) on the attention weights, or None.

    Returns:
        (H, B, L, e).

    >>> q = torch.randn(2, 3, 1, 8)
    >>> k = torch.randn(2, 3, 4, 8)
    >>> relative_attention(q, q, k, k, torch.randn(2, 8, 5), None).shape
    torch.Size([2, 3, 1, 8])
    """
    inputs = _under_autocast(content_query, position_query, keys, values, positions)
    if not _fits(inputs, [m for m in (mask, dropout_mask) if m is not None]):
        return reference.relative_attention(content_query, position_query, keys, values, positions, mask, dropout_mask)
    return _Fused.apply(*inputs, mask, dropout_mask)  # pyright: ignore[reportReturnType]


def _under_autocast(*inputs: Tensor) -> tuple[Tensor, ...]:
    """The inputs as autocast would hand them to a matrix product."""
    device = inputs[0].device.type
    if not torch.is_autocast_enabled(device):
        return inputs
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in inputs)


def _fits(inputs: tuple[Tensor, ...], masks: list[Tensor]) -> bool:
    first = inputs[0]
    alike = all(t.dtype == first.dtype for t in inputs)
    sized = INTERPRETED or (first.dtype != torch.float64 and first.shape[-1] * first.element_size() <= WIDEST)
    return fused(*inputs, *masks) and alike and sized and not any(m.requires_grad for m in masks)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        from equilibria.kernels.relative_attention import triton

        output, total = triton.forward(*inputs)
        ctx.save_for_backward(*inputs, output, total)
        return output

    @staticmethod
    def backward(ctx, *grads):
        *inputs, output, total = ctx.saved_tensors
        (grad,) = grads
        if torch.is_grad_enabled() or not fused(grad):
            return _by_reference(ctx.needs_input_grad, inputs, grad)
        from equilibria.kernels.relative_attention import triton

        return *triton.backward(ctx.needs_input_grad, inputs, output, total, grad), None, None


def _by_reference(wanted: tuple[bool, ...], inputs: list[Tensor], grad: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients by the reference, recorded where higher ones are wanted."""
    higher = torch.is_grad_enabled()
    with torch.enable_grad():
        # Aliases, since one input may have been computed from another, of which the derivative is not asked for here.
        inputs = [t if t is None else t.view_as(t) for t in inputs]
        chosen = [t for t, want in zip(inputs, wanted, strict=True) if want]
        output = reference.relative_attention(*inputs)
        found = iter(torch.autograd.grad(output, chosen, grad, create_graph=higher))
    return tuple(next(found) if want else None for want in wanted)
