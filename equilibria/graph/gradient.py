"""Implicit differentiation inside a graph: a forward and a backward solve, each a loop, as one autograd function."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

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
            """g + u J. A loop cannot keep a record made outside of it: that f is evaluated once is the work of `hoist`."""
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
