"""Unrolled differentiation: autograd records the solver's own steps."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from equilibria.adjoints.adjoint import DeclaredFunction, Forward
from equilibria.iterate import Solved


@dataclass(frozen=True, kw_only=True)
class Unrolled:
    """The exact gradient of what the solver computed, converged or not. Memory grows with the number of evaluations.

    Gradients flow to z0 as well, and through tensors that f uses without being passed them.

    >>> import torch
    >>> from equilibria import Picard, Stopping, fixed_point
    >>> a = torch.ones(1, 1, requires_grad=True)
    >>> z, _ = fixed_point(
    ...     lambda z, a: 0.5 * z + a, torch.zeros(1, 1), a,
    ...     solver=Picard(), stopping=Stopping(max_evals=3), adjoint=Unrolled(),
    ... )
    >>> float(torch.autograd.grad(z.sum(), a)[0])
    1.5
    """

    def solve(self, f: DeclaredFunction, z0: Tensor, args: tuple[Tensor, ...], forward: Forward) -> Solved:
        fz0 = forward.probe(f, z0, args, check_grad=False)
        return forward(f, z0, fz0, args)
