"""Implicit differentiation: the gradient of a fixed point, by the implicit function theorem."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from equilibria.adjoints.adjoint import DeclaredFunction, Forward
from equilibria.adjoints.implicit_function import LinearSystem, fixed_point_of, linear_run
from equilibria.iterate import Solved
from equilibria.solvers import GMRES, Solver
from equilibria.solvers.solver import check_choice
from equilibria.stopping import Stopping


@dataclass(frozen=True, kw_only=True)
class Implicit:
    """Gradients at the fixed point itself, whatever way the solver took to it.

    With z* = f(z*, a) and J = ∂f/∂z at z*, an incoming gradient g (the row vector ∂loss/∂z*) gives

    ∂loss/∂a = u ∂f/∂a,   where u = u J + g

    is again a fixed point, of an affine map, solved with `solver` to `stopping`. Between forward and backward only z* is
    held, not the activations of f. Second derivatives, forward mode and torch.func transforms work, since u is had from
    another implicit solve wherever it must be differentiated. z0 receives no gradient: the fixed point does not depend
    on where the search began. What each backward solve cost and achieved is appended to `stats.backward` of the solution.

    Source: Bai, Kolter and Koltun 2019, section 3.1.2 (theorem 1).

    >>> import torch
    >>> from equilibria import fixed_point
    >>> a = torch.ones(1, 1, requires_grad=True)
    >>> z, stats = fixed_point(lambda z, a: 0.5 * z + a, torch.zeros(1, 1), a, adjoint=Implicit())
    >>> round(float(torch.autograd.grad(z.sum(), a)[0]), 3)
    2.0
    >>> stats.backward[0].evaluations
    1
    """

    solver: Solver[Any] = field(default_factory=GMRES)
    """Of the backward system. GMRES needs the fewest evaluations; Picard, Anderson and Broyden work as well."""
    stopping: Stopping = field(default_factory=lambda: Stopping(rtol=1e-4, max_evals=50))
    """Of the backward system; an evaluation is one vector-Jacobian product."""

    def __post_init__(self) -> None:
        check_choice("solver", self.solver, ("init", "step"), "GMRES()")
        check_choice("stopping", self.stopping, ("tolerance",), "Stopping(rtol=1e-4)")

    def solve(self, f: DeclaredFunction, z0: Tensor, args: tuple[Tensor, ...], forward: Forward) -> Solved:
        return fixed_point_of(self, f, z0, args, forward)

    def linear(self, system: LinearSystem) -> Tensor:
        return system.solve(self, linear_run(self.solver, self.stopping))
