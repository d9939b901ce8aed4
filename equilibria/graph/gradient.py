"""Implicit differentiation inside a graph: a forward and a backward solve, each a loop, as one autograd function."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._dynamo import assume_constant_result
from torch._dynamo.callback import callback_handler
from torch._functorch import config

from equilibria.graph.search import search
from equilibria.graph.traced import Traced
from equilibria.iterate import Solved
from equilibria.solvers import Solver
from equilibria.stopping import Stopping


class Rule(NamedTuple):
    """How a fixed point is found and differentiated."""

    f: Traced
    solver: Solver[Any]
    stopping: Stopping
    backward_solver: Solver[Any]
    backward_stopping: Stopping


def differentiated(rule: Rule, z0: Tensor, known: Tensor) -> tuple[Solved, Tensor]:
    """The fixed point, searched from z0 where f(z0) is `known`, with gradients in the tensors of f; evaluations spent."""
    _keep_buffers()
    *solved, evaluations = _FixedPoint.apply(rule, z0, known, *rule.f.tensors)  # type: ignore[misc]
    return Solved(*solved), evaluations


class _FixedPoint(torch.autograd.Function):
    """z0, f(z0), *tensors -> the fields of Solved, evaluations."""

    @staticmethod
    def forward(ctx: Any, rule: Rule, z0: Tensor, known: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        solved, evaluations = search(rule.solver, lambda z: rule.f(z, *tensors), z0, known, rule.stopping)
        ctx.rule = rule
        ctx.save_for_backward(solved.z, *tensors)
        ctx.mark_non_differentiable(*solved[1:], evaluations)
        return (*solved, evaluations)

    @staticmethod
    def backward(ctx: Any, g: Tensor, *_: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        rule: Rule = ctx.rule
        z, *tensors = ctx.saved_tensors
        g = g.clone()  # the compiler takes z* and the gradient that reaches it for one tensor

        def pull(u: Tensor) -> Tensor:
            """g + u J. f is evaluated anew for each product: a loop cannot keep a record that was made outside of it."""
            return g + torch.func.vjp(lambda z: rule.f(z, *tensors), z)[1](u)[0]

        solved = search(rule.backward_solver, pull, torch.zeros_like(g), g, rule.backward_stopping)[0]
        places = [i for i, needed in enumerate(ctx.needs_input_grad[3:]) if needed]

        def of_wanted(*values: Tensor) -> Tensor:
            replaced = list(tensors)
            for place, value in zip(places, values, strict=True):
                replaced[place] = value
            return rule.f(z, *replaced)

        found = torch.func.vjp(of_wanted, *(tensors[i] for i in places))[1](solved.z)
        gradients: list[Tensor | None] = [None] * len(tensors)
        for place, gradient in zip(places, found, strict=True):
            gradients[place] = gradient
        return (None, None, None, *gradients)


@assume_constant_result  # so it runs while the graph is traced, not in the graph
def _keep_buffers() -> bool:
    """Have no buffer of this graph's forward pass donated to its backward pass.

    PyTorch 2.13 takes the numbers of donated inputs of a backward graph for those of inputs of the loops inside it as well.
    A loop then overwrites what others still read, and the gradients are wrong.
    """
    if _options.donated_buffer:
        _options.donated_buffer = False
        if _donate_again not in callback_handler.end_callbacks:
            callback_handler.register_end_callback(_donate_again)
        _kept.append(True)
    return True


_options: Any = config
_kept: list[bool] = []


def _donate_again(_: Any) -> None:
    if _kept:
        _kept.clear()
        _options.donated_buffer = True
