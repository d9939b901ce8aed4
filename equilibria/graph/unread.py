"""What a loop of a graph carries from step to step and nobody reads: dropped, with the work of making it.

A solver's state and the record of a solve hold more than every solver and every caller asks for: `Picard` goes on from f(z)
alone, and who returns z* only needs no count of the steps.
"""

from __future__ import annotations

import operator
from typing import Any, cast

from torch.fx import Graph, Node

from equilibria.graph.while_loop import WhileLoop, loops_of


def drop_unread(graph: Graph) -> None:
    """Do it for every loop of the graph."""
    for loop in loops_of(graph):
        _drop(graph, loop)


def _drop(graph: Graph, loop: WhileLoop) -> None:
    results = {cast(int, user.args[1]): user for user in loop.node.users if user.target is operator.getitem}
    if len(results) != len(loop.node.users):  # somebody takes them all
        return
    count = len(loop.carried)
    (output,) = loop.body.graph.find_nodes(op="output")
    made = cast("tuple[Any, ...]", output.args[0])
    inputs = [part.graph.find_nodes(op="placeholder")[:count] for part in (loop.cond, loop.body)]
    read = {i for i in range(count) if (i in results and results[i].users) or inputs[0][i].users}
    places = {node: i for i, node in enumerate(inputs[1])}
    open_, seen = [made[i] for i in read], set()
    while open_:  # what is read rests on what the body reads for it
        node = open_.pop()
        if not isinstance(node, Node) or node in seen:
            continue
        seen.add(node)
        open_ += node.all_input_nodes
        if node in places and places[node] not in read:
            read.add(places[node])
            open_.append(made[places[node]])
    if len(read) == count:
        return
    kept = sorted(read)
    output.args = (tuple(made[i] for i in kept),)
    loop.body.graph.eliminate_dead_code()
    for part in inputs:
        for i in set(range(count)) - read:
            part[i].graph.erase_node(part[i])
    for i, result in results.items():
        if i in read:
            result.args = (loop.node, kept.index(i))
        else:
            graph.erase_node(result)
    loop.node.meta["val"] = tuple(loop.node.meta["val"][i] for i in kept)
    loop.replace(carried=[loop.carried[i] for i in kept], constants=loop.constants)
