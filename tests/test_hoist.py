"""What a loop of a graph need not repeat: the pass alone, on graphs that are traced by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from loops import bodies, changed, looped, operators, traced
from torch import Tensor
from torch.fx import GraphModule, Node

from equilibria.graph.hoist import hoist

aten = torch.ops.aten


def hoisted(f: Callable[..., Any], *inputs: Tensor) -> GraphModule:
    return changed(hoist, f, *inputs)


@pytest.fixture
def z() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(4, 4)


@pytest.fixture
def W() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(4, 4) / 4


def test_work_without_the_state_is_done_once(z: Tensor, W: Tensor) -> None:
    graph = hoisted(looped(lambda z, W, x: torch.tanh(z @ W + torch.sin(x @ W.t()))), z, W, z + 1)
    assert bodies(graph)[0].count(aten.mm.default) == 1
    assert aten.sin.default not in bodies(graph)[0]
    assert operators(graph).count(aten.mm.default) == 1
    assert operators(graph).count(aten.sin.default) == 1


def test_results_of_several_parts(z: Tensor, W: Tensor) -> None:
    graph = hoisted(looped(lambda z, W: z * 0.5 + torch.var_mean(W, dim=1)[0]), z, W)
    assert aten.var_mean.correction not in bodies(graph)[0]


def test_cheap_things_stay(z: Tensor, W: Tensor) -> None:
    graph = hoisted(looped(lambda z, W: z * torch.full((4, 4), 0.5) + W[0].double().expand(4, 4)), z.double(), W)
    assert {aten.full.default, aten.select.int, aten._to_copy.default, aten.expand.default} <= set(bodies(graph)[0])
    assert operators(graph) == operators(traced(looped(lambda z, W: z), z, W))


def test_a_copy_of_lower_precision_is_made_once(z: Tensor, W: Tensor) -> None:
    def step(z: Tensor, W: Tensor) -> Tensor:
        return torch.tanh(z.to(torch.bfloat16) @ W.to(torch.bfloat16)).float()

    graph = hoisted(looped(step), z, W)
    assert bodies(graph)[0].count(aten._to_copy.default) == 2  # of z, and of the product
    assert operators(graph).count(aten._to_copy.default) == 1


@torch.library.custom_op("equilibria_tests::unknown", mutates_args=())
def unknown(x: Tensor) -> Tensor:
    return x + 1


@unknown.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@pytest.mark.parametrize("target", [aten.bernoulli.p, torch.ops.equilibria_tests.unknown.default])
def test_random_and_unknown_operators_stay(target: Any, z: Tensor, W: Tensor) -> None:
    draws = target is aten.bernoulli.p
    step = looped(lambda z, W: z + (torch.bernoulli(W, 0.5) if draws else unknown(W)) * W.sin())
    graph = traced(step, z, W)
    hoist(graph.graph)
    assert target in bodies(graph)[0]
    assert aten.sin.default not in bodies(graph)[0]


def test_what_follows_the_loop_shares_its_work(z: Tensor, W: Tensor) -> None:
    def run(z: Tensor, W: Tensor) -> Tensor:
        return looped(lambda z, W: z + torch.sin(W @ W))(z, W) + torch.sin(W @ W).cos()

    assert operators(hoisted(run, z, W)).count(aten.mm.default) == 1


def test_several_loops(z: Tensor, W: Tensor) -> None:
    def run(z: Tensor, W: Tensor) -> Tensor:
        first = looped(lambda z, W: z + torch.sin(W))(z, W)
        return looped(lambda z, first: z * torch.sin(first))(z, first)

    graph = hoisted(run, z, W)
    assert all(aten.sin.default not in body for body in bodies(graph))
    assert operators(graph).count(aten.sin.default) == 2


def test_a_body_of_two_loops_is_left_alone(z: Tensor, W: Tensor) -> None:
    graph = traced(looped(lambda z, W: z + torch.sin(W)), z, W)
    (loop,) = graph.graph.find_nodes(op="call_function", target=torch.ops.higher_order.while_loop)
    assert isinstance(loop, Node)
    with graph.graph.inserting_after(loop):
        graph.graph.node_copy(loop)
    hoist(graph.graph)
    assert aten.sin.default in bodies(graph)[0]


def test_nothing_to_do(z: Tensor, W: Tensor) -> None:
    graph = traced(looped(lambda z, W: torch.tanh(z @ W)), z, W)
    before = str(graph.graph)
    hoist(graph.graph)
    assert str(graph.graph) == before
    plain = traced(torch.sin, z)
    before = str(plain.graph)
    hoist(plain.graph)
    assert str(plain.graph) == before
