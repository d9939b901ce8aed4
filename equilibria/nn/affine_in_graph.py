"""The products of `equilibria.nn.affine` inside a graph. Imported only while torch.compile traces one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._dynamo import assume_constant_result

from equilibria.nn.wide_product import product
from equilibria.transforms import forward_modes, hides_batch


@assume_constant_result  # asked while the graph is traced, when the transforms that the graph is made of are running
def suits() -> bool:
    """Whether these products may be part of the graph: a program that is exported must not need this library."""
    return not torch.compiler.is_exporting() and not forward_modes() and not hides_batch()


def multiplied(x: Tensor, weight: Tensor, bias: Tensor | None, then: str) -> Tensor:
    return _Multiplied.apply(x, weight, bias, then)  # type: ignore[return-value]


@torch.library.custom_op("equilibria::affine", mutates_args=())
def product_in_graph(x: Tensor, weight: Tensor, bias: Tensor | None, then: str) -> Tensor:
    """`product` as an operator of its own: in a graph the compiler takes oneDNN's for weights that never change alone."""
    return product(x, weight, bias, then)


@product_in_graph.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, then: str) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


class _Multiplied(torch.autograd.Function):
    """With a backward pass of such products. The compiler drops the gradients that nobody asks for by itself."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, then: str) -> Tensor:
        return product_in_graph(x, weight, bias, then)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None, str], output: Tensor) -> None:
        x, weight, bias, then = inputs
        ctx.save_for_backward(x, weight, *([output] if then == "relu" else []))
        ctx.bias_dims = 0 if bias is None else bias.dim()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = gradients
        x, weight, *relu = ctx.saved_tensors
        if relu:
            g = torch.ops.aten.threshold_backward(g, relu[0], 0)
        g_bias = (None, g.sum(0), g)[ctx.bias_dims]  # while a graph is traced, needs_input_grad does not tell the truth
        return product_in_graph(g, weight.t(), None, "none"), product_in_graph(g.t(), x.t(), None, "none"), g_bias, None
