"""Loops of a graph, traced by hand, for the tests of what is done to them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

STEPS = 3


def looped(step: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """z, *constants -> step(step(step(z, *constants), ...))."""

    def run(z: Tensor, *constants: Tensor) -> Tensor:
        def unfinished(k: Tensor, z: Tensor, *constants: Tensor) -> Tensor:
            return k < STEPS

        def advance(k: Tensor, z: Tensor, *constants: Tensor) -> tuple[Tensor, Tensor]:
            return k + 1, step(z, *constants)

        return torch.ops.higher_order.while_loop(unfinished, advance, (torch.zeros((), dtype=torch.int64), z), constants)[1]

    return run


def traced(f: Callable[..., Any], *inputs: Tensor) -> GraphModule:
    return make_fx(f, tracing_mode="fake")(*inputs)


def bodies(graph: GraphModule) -> list[list[Any]]:
    """The operators in the body of every loop."""
    loops = graph.graph.find_nodes(op="call_function", target=torch.ops.higher_order.while_loop)
    return [operators(getattr(graph, loop.args[1].target)) for loop in loops]


def operators(graph: GraphModule) -> list[Any]:
    return [node.target for node in graph.graph.nodes if node.op == "call_function"]


def changed(change: Callable[[Graph], None], f: Callable[..., Any], *inputs: Tensor) -> GraphModule:
    """f as a graph that was changed, checked to be the same function still."""
    graph = traced(f, *inputs)
    change(graph.graph)
    graph.graph.lint()
    graph.recompile()
    torch.testing.assert_close(graph(*inputs), f(*inputs))
    return graph
