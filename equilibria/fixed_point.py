"""The one differentiable entry: z* = f(z*, *args)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from equilibria.adjoints import Adjoint, Forward, Implicit
from equilibria.declared import Declared
from equilibria.solution import NonFiniteError, Solution
from equilibria.solvers import Anderson, Solver
from equilibria.solvers.solver import check_choice
from equilibria.stopping import Stopping
from equilibria.structure import layout_of


def fixed_point(
    f: Callable[..., Any],
    z0: Any,
    *args: Any,
    solver: Solver[Any] | None = None,
    stopping: Stopping | None = None,
    adjoint: Adjoint | None = None,
    batch_dims: Sequence[int | None] | None = None,
    raise_nonfinite: bool = True,
) -> Solution:
    """Solve z = f(z, *args) for every sample of a batch, and be differentiable in args.

    Args:
        f: the map. `f(z, *args)` returns the structure, shapes and dtype of z0. It treats samples independently and is
            deterministic. If it is an nn.Module, or a bound method of one, its parameters and buffers count as passed.
        z0: where the search starts: a tensor (B, ...) with the batch first, or a tuple, list, dict or named tuple of them.
        args: everything else that f depends on: tensors, structures of tensors, or constants (None, numbers, strings).
        solver: `Anderson()` by default.
        stopping: tolerances and budget, `Stopping()` by default: relative residual 1e-3, at most 100 evaluations.
        adjoint: how gradients are had, `Implicit()` by default.
        batch_dims: one entry per arg: the dimension that carries the batch in all its tensors, or None. Given, samples
            that need more steps than most are solved in a smaller batch; not given, the batch stays whole.
        raise_nonfinite: raise when a sample becomes inf or NaN; False returns it with `Status.NONFINITE`.

    Returns:
        `Solution(z, stats)`: z in the structure of z0, and statistics for every sample. A sample that did not reach the
        tolerance within the budget is returned with its smallest residual and `Status.EXHAUSTED`.

    Raises:
        UndeclaredTensorError: f uses a tensor that requires grad and was not passed (except with `Unrolled`, which
            loses nothing).
        RandomMapError: f draws random numbers.
        NonFiniteError: see `raise_nonfinite`.
        ValueError, TypeError: z0 is no state, or f returned something else than a state.

    Under torch.compile:
        A compiled f, torch.compile(f) or block.compile(), serves like any other, with all derivatives; those of second
        order and torch.func transforms run it uncompiled. A whole solve becomes one graph, fullgraph=True included, if
        its solver is Picard, ReversiblePicard, Anderson, or Broyden without line search, and, where it needs a gradient,
        its adjoint is Implicit with such a solver. In the graph f is not checked for random numbers, the batch stays
        whole, raise_nonfinite is not heeded (look at the status), and stats.backward stays empty. Other solves leave the
        graph and run eagerly.

    Source: Bai, Kolter and Koltun 2019, "Deep equilibrium models", section 3.1.

    >>> import torch
    >>> W, x = 0.1 * torch.randn(8, 8), torch.randn(2, 8)
    >>> W.requires_grad_() is W
    True
    >>> z, stats = fixed_point(lambda z, W, x: torch.tanh(z @ W + x), torch.zeros_like(x), W, x)
    >>> bool(stats.converged.all())
    True
    >>> z.sum().backward()
    """
    solver = _SOLVER if solver is None else solver
    stopping = _STOPPING if stopping is None else stopping
    adjoint = _ADJOINT if adjoint is None else adjoint
    check_choice("solver", solver, ("init", "step"), "Anderson()")
    check_choice("stopping", stopping, ("tolerance",), "Stopping(rtol=1e-3)")
    check_choice("adjoint", adjoint, ("solve",), "Implicit()")
    eager = partial(_solve, f, z0, args, Forward(solver, stopping, raise_nonfinite=raise_nonfinite), adjoint, batch_dims)
    if torch.compiler.is_compiling():
        from equilibria.graph import solve_in_graph

        return solve_in_graph(f, z0, args, solver, stopping, adjoint, eager)
    return eager()


_SOLVER, _STOPPING, _ADJOINT = Anderson(), Stopping(), Implicit()


def _solve(
    f: Callable[..., Any],
    z0: Any,
    args: Sequence[Any],
    forward: Forward,
    adjoint: Adjoint,
    batch_dims: Sequence[int | None] | None,
) -> Solution:
    layout = layout_of(z0)
    declared = Declared(f, layout, args, batch_dims)
    try:
        solved = adjoint.solve(declared, layout.pack(z0), declared.tensors, forward)
    except NonFiniteError as error:
        if error.solution is not None:
            error.solution = error.solution._replace(z=layout.unpack(error.solution.z))
        raise
    return Solution(layout.unpack(solved.z), forward.stats(solved))
