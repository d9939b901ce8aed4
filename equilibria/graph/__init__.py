"""The whole solve as one graph: what `fixed_point` does while torch.compile traces it.

Imported only then, for it needs the compiler, which takes as long to import as the rest of torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from equilibria.adjoints import Adjoint, Implicit
from equilibria.graph.gradient import Rule, differentiated
from equilibria.graph.search import search
from equilibria.graph.settings import set_for_this_graph
from equilibria.graph.traced import Traced
from equilibria.iterate import Solved
from equilibria.solution import Solution, Stats
from equilibria.solvers import Solver
from equilibria.stopping import Stopping
from equilibria.structure import Layout, layout_of


def solve_in_graph(
    f: Callable[..., Any],
    z0: Any,
    args: Sequence[Any],
    solver: Solver[Any],
    stopping: Stopping,
    adjoint: Adjoint,
    eager: Callable[[], Solution],
) -> Solution:
    """The solve as a loop inside the graph that is being traced, or `eager()` outside of it where that cannot be.

    The same steps as the eager loop takes, on the whole batch; f is not probed for randomness, and no status raises.
    """
    if not _can_trace(solver, stopping):
        return _outside_for_its_steps(eager)
    set_for_this_graph()
    layout = layout_of(z0)
    traced, start = Traced(f, layout, args), layout.pack(z0).detach()
    known = traced.as_given(start)
    if not known.requires_grad:
        return _solution(layout, *search(solver, traced.as_given, start, known, stopping))
    if not isinstance(adjoint, Implicit) or not _can_trace(adjoint.solver, adjoint.stopping):
        return _outside_for_its_gradient(eager)
    known = traced(start, *(tensor.detach() for tensor in traced.tensors))
    if known.requires_grad:
        return _outside_for_what_it_uses(eager)
    rule = Rule(traced, solver, stopping, adjoint.solver, adjoint.stopping)
    return _solution(layout, *differentiated(rule, start, known))


def _can_trace(solver: Solver[Any], stopping: Stopping) -> bool:
    return getattr(solver, "traceable", False) and not stopping.trace


def _solution(layout: Layout, solved: Solved, evaluations: Tensor) -> Solution:
    stats = Stats(
        residual=solved.residual,
        relative=solved.relative,
        evaluations=cast(int, evaluations.item()),
        steps=solved.steps,
        status=solved.status,
    )
    return Solution(layout.unpack(solved.z), stats)


@torch.compiler.disable(
    reason="only Picard(), ReversiblePicard(), Anderson() and Broyden() without line search, and no Stopping(trace=True), "
    "can be traced as one graph: use one of those, or compile the map alone: f = torch.compile(f) or block.compile()"
)
def _outside_for_its_steps(eager: Callable[[], Solution]) -> Solution:
    return eager()


@torch.compiler.disable(
    reason="gradients through a solve can be traced with adjoint=Implicit(solver=...) alone, its solver one of Picard(), "
    "ReversiblePicard(), Anderson() and Broyden() without line search: use one of those, solve under torch.no_grad(), or "
    "compile the map alone, f = torch.compile(f) or block.compile()"
)
def _outside_for_its_gradient(eager: Callable[[], Solution]) -> Solution:
    return eager()


@torch.compiler.disable(
    reason="f uses a tensor that requires grad but is not passed, so its gradient would be lost: pass it in args, "
    "f(z, *args), or make f the nn.Module that owns it"
)
def _outside_for_what_it_uses(eager: Callable[[], Solution]) -> Solution:
    return eager()
