"""What a loop of a graph carries for nobody: dropping it alone, on graphs that are traced by hand."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from loops import bodies, changed, traced
from torch import Tensor
from torch.fx import GraphModule

from equilibria.graph.unread import drop_unread

aten = torch.ops.aten


def run(wanted: Sequence[int], z: Tensor, W: Tensor) -> list[Tensor]:
    """Some of: steps, z, what a later z is made of, a sum that goes into itself alone, and one that goes into another."""

    def unfinished(k: Tensor, *_: Tensor) -> Tensor:
        return k < 3

    def advance(
        k: Tensor, z: Tensor, before: Tensor, own: Tensor, other: Tensor, W: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return k + 1, torch.tanh(z @ W) + before, z.sin(), own + z.cos(), other + own.exp()

    begin = (torch.zeros((), dtype=torch.int64), z, z + 1, z + 2, z + 3)
    found = torch.ops.higher_order.while_loop(unfinished, advance, begin, (W,))
    return [found[i] for i in wanted]


def carried(graph: GraphModule) -> int:
    (loop,) = graph.graph.find_nodes(op="call_function", target=torch.ops.higher_order.while_loop)
    return len(loop.args[2])


def z_and_W() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return torch.randn(4, 4, generator=draw), torch.randn(4, 4, generator=draw) / 4


def test_keeps_what_the_wanted_rests_on() -> None:
    graph = changed(drop_unread, lambda z, W: run([1], z, W), *z_and_W())
    assert carried(graph) == 3  # steps are read by the condition
    assert not {aten.cos.default, aten.exp.default} & set(bodies(graph)[0])


def test_moves_results_to_their_new_places() -> None:
    graph = changed(drop_unread, lambda z, W: run([3, 0], z, W), *z_and_W())
    assert carried(graph) == 4
    assert carried(changed(drop_unread, lambda z, W: run([4], z, W), *z_and_W())) == 5


def test_keeps_a_loop_whose_results_are_all_read() -> None:
    graph = traced(lambda z, W: run(range(5), z, W), *z_and_W())
    before = str(graph.graph)
    drop_unread(graph.graph)
    assert str(graph.graph) == before
