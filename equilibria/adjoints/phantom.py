"""Phantom gradients: a few recorded steps from the fixed point stand in for the implicit gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from equilibria.adjoints.adjoint import DeclaredFunction, Forward, Function
from equilibria.adjoints.implicit import Implicit
from equilibria.iterate import Solved
from equilibria.solvers.solver import check_count, check_damping
from equilibria.transforms import differentiating, reverse_alone


@dataclass(frozen=True, kw_only=True)
class Phantom:
    """The gradient of `steps` damped steps taken from z*, without a backward solve.

    z ← (1 - damping) z + damping f(z, a), recorded by autograd from a detached z*, truncates the Neumann series of the
    implicit gradient. With one step and damping 1 it is Jacobian-free backpropagation: u = g. The value returned is z*
    itself, so that training and evaluation see the same z and the residual is that of what is returned. The recorded
    steps count as evaluations, and their activations are held until the backward pass.

    Sources: Geng, Zhang, Bai, Wang and Lin 2021, "On training implicit models", section 3; Fung et al. 2022,
    "JFB: Jacobian-free backpropagation for implicit networks".

    >>> import torch
    >>> from equilibria import fixed_point
    >>> a = torch.ones(1, 1, requires_grad=True)
    >>> z, stats = fixed_point(lambda z, a: 0.5 * z + a, torch.zeros(1, 1), a, adjoint=Phantom(steps=1))
    >>> float(torch.autograd.grad(z.sum(), a)[0])
    1.0
    """

    steps: int = 1
    damping: float = 1.0

    def __post_init__(self) -> None:
        check_count("Phantom", "steps", self.steps, 1)
        check_damping("Phantom", self.damping)

    def solve(self, f: DeclaredFunction, z0: Tensor, args: tuple[Tensor, ...], forward: Forward) -> Solved:
        if reverse_alone():
            fz0 = forward.probe(f, z0, args, check_grad=differentiating())
            with torch.no_grad():
                solved = forward(f, z0.detach(), fz0.detach(), args)
        else:  # under a transform, it is the autograd function that knows how to solve
            solved = Implicit().solve(f, z0.detach(), tuple(arg.detach() for arg in args), forward)
        if not differentiating():
            return solved
        z = self.walk(f, solved.z, args)
        forward.evaluations += self.steps
        # The value of z*, the gradient of the steps; a sample without a finite value passes none on.
        attached = torch.where(z.isfinite(), z - z.detach(), 0.0)
        return solved._replace(z=solved.z + attached)

    def walk(self, f: Function, z: Tensor, args: Sequence[Tensor]) -> Tensor:
        """Where `steps` damped steps from z lead."""
        for _ in range(self.steps):
            fz = f(z, *args)
            z = fz if self.damping == 1.0 else z + self.damping * (fz - z)
        return z
