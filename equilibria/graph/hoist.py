"""Loop-invariant work out of the loops of a graph: what does not change from step to step is computed once, before it.

Of f that is all that does not depend on z. Of a backward solve it is f itself: as it is traced, a product u J evaluates f
at z* each time, for a loop cannot keep a record that was made outside of it. Taken out, that evaluation is the record.

Source: Aho, Lam, Sethi, Ullman 2006, "Compilers", section 9.5, on code motion.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from equilibria.graph.while_loop import WhileLoop, loops_of

_OWN = ("aten", "prims", "equilibria")
"""Whose operators are known: of others it is not certain that the same inputs give the same result."""
_CHEAP = frozenset({"_to_copy", "arange", "convert_element_type", "empty", "full", "iota", "scalar_tensor"})
"""What a step makes faster than it reads it, if it is made of less than it is: constants, copies of a higher precision."""


def hoist(graph: Graph) -> None:
    """Do it for every loop of the graph."""
    moved = [node for loop in loops_of(graph) for node in _hoisted(graph, loop)]
    if moved:
        _share(graph, {node.target for node in moved})


def _hoisted(graph: Graph, loop: WhileLoop) -> list[Node]:
    """Move the invariant work of one loop in front of it; the nodes that were made there."""
    body, given = loop.body.graph, loop.body.graph.find_nodes(op="placeholder")
    invariant = set(given[len(loop.carried) :])
    for node in body.nodes:
        if _pure(node) and all(source in invariant for source in node.all_input_nodes):
            invariant.add(node)
    taken = _frontier(body, invariant)
    if not taken:
        return []
    outside: dict[Node, Any] = dict(zip(given, (*loop.carried, *loop.constants), strict=True))
    made = []
    with graph.inserting_before(loop.node):
        for node in _needed(body, taken):
            outside[node] = graph.node_copy(node, lambda source: outside[source])
            outside[node].meta = {"val": node.meta["val"]}  # not the mark of a backward pass, which could not be shared
            made.append(outside[node])
    _new_inputs(loop.cond.graph, taken)
    for node, value in zip(taken, _new_inputs(body, taken), strict=True):
        node.replace_all_uses_with(value)
    loop.replace(carried=loop.carried, constants=(*loop.constants, *(outside[node] for node in taken)))
    return made


def _frontier(body: Graph, invariant: set[Node]) -> list[Node]:
    """What a step has to be given in the place of the invariant nodes; cheap ones stay, made of what they are made of."""
    taken: dict[Node, None] = {}
    stay = {node for node in invariant if node.op == "placeholder"}
    for node in reversed(body.nodes):
        if node not in invariant or node in stay:
            continue
        if any(user not in invariant or user in stay for user in node.users):
            if _cheap(node):
                stay.add(node)
            else:
                taken[node] = None
    return [node for node in body.nodes if node in taken]


def _needed(body: Graph, taken: Iterable[Node]) -> list[Node]:
    """These nodes and all that they are made of, in order; no placeholders."""
    needed, open_ = set(), list(taken)
    while open_:
        node = open_.pop()
        if node.op != "placeholder" and node not in needed:
            needed.add(node)
            open_ += node.all_input_nodes
    return [node for node in body.nodes if node in needed]


def _new_inputs(part: Graph, values: Iterable[Node]) -> list[Node]:
    """Placeholders behind those that are there."""
    made = []
    last = part.find_nodes(op="placeholder")[-1]
    for value in values:
        with part.inserting_after(last):
            last = part.placeholder(f"invariant_{value.name}")
        last.meta = {"val": value.meta["val"]}
        made.append(last)
    return made


def _pure(node: Node) -> bool:
    """Whether the value of a node follows from its inputs, and is made of tensors alone."""
    if node.op != "call_function" or not _of_tensors(node.meta.get("val")):
        return False
    if node.target is operator.getitem:
        return True
    if not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace not in _OWN:
        return False
    random = torch.Tag.nondeterministic_seeded in node.target.tags or _name(node.target).startswith("inductor_")
    return not random and not node.target._schema.is_mutable


def _of_tensors(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return any(isinstance(part, Tensor) for part in value)
    return isinstance(value, Tensor)


def _cheap(node: Node) -> bool:
    """A view, or what costs no more than to read it."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):  # a part of a result of several
        return False
    if target.is_view:
        return True
    less = sum(_bytes(source) for source in node.all_input_nodes) < _bytes(node)
    return less and _name(target) in _CHEAP


def _name(operator: torch._ops.OpOverload) -> str:
    return operator._schema.name.partition("::")[2]


def _bytes(node: Node) -> int:
    value = node.meta["val"]
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0


def _share(graph: Graph, targets: set[Any]) -> None:
    """One node in the place of equal ones: the loop's evaluation of f at z* is also that of the last product."""
    first: dict[Hashable, Node] = {}
    for node in graph.nodes:
        if node.target not in targets or not _pure(node):
            continue
        key = (node.target, node.args, tuple(sorted(node.kwargs.items())))
        try:
            same = first.setdefault(key, node)
        except TypeError:  # an argument that has no hash
            continue
        if same is not node:
            node.replace_all_uses_with(same)
            graph.erase_node(node)
