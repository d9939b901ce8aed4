"""A loop as PyTorch's compiler holds it: a node of a graph, and two graphs of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.fx import Graph, GraphModule, Node


@dataclass(frozen=True)
class WhileLoop:
    """while cond(*carried, *constants): carried = body(*carried, *constants)"""

    node: Node
    cond: GraphModule
    body: GraphModule
    carried: tuple[Any, ...]
    """What the loop begins with, made before it."""
    constants: tuple[Any, ...]

    def replace(self, *, carried: Sequence[Any], constants: Sequence[Any]) -> None:
        """Begin with these instead, once cond and body have been changed to take them."""
        self.node.args = (*self.node.args[:2], tuple(carried), tuple(constants))
        for part in (self.cond, self.body):
            part.graph.eliminate_dead_code()
            part.recompile()


def loops_of(graph: Graph) -> Iterator[WhileLoop]:
    """Its loops, but not those that share a body or a condition with another."""
    for node in graph.find_nodes(op="call_function", target=torch.ops.higher_order.while_loop):
        *names, carried, constants = cast("tuple[Node, Node, tuple[Any, ...], tuple[Any, ...]]", node.args)
        if graph.owning_module is not None and all(len(name.users) == 1 for name in names):
            cond, body = (cast(GraphModule, getattr(graph.owning_module, cast(str, name.target))) for name in names)
            yield WhileLoop(node, cond, body, tuple(carried), tuple(constants))
