"""The Neumann series: an implicit gradient cut off after a few terms."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from equilibria.adjoints.adjoint import DeclaredFunction, Forward
from equilibria.adjoints.implicit_function import LinearSystem, fixed_point_of
from equilibria.iterate import Solved
from equilibria.solvers.solver import check_count


@dataclass(frozen=True, kw_only=True)
class Neumann:
    """u = g (I + J + ... + J^(terms - 1)) in the place of the implicit gradient's u = g (I - J)⁻¹.

    Costs terms - 1 vector-Jacobian products over one record of f at z*, where `Phantom` holds a record for each of its
    steps. The relative error is about ρ^terms where the spectral radius ρ of J is below 1; above 1 the series diverges. One
    term is Jacobian-free backpropagation. Forward mode, torch.func transforms and second derivatives work, of the
    truncated series; nothing is added to `stats.backward`, for no residual is measured.

    Sources: Geng, Zhang, Bai, Wang and Lin 2021, "On training implicit models", section 3 (Neumann-series phantom
    gradient); Lorraine, Vicol and Duvenaud 2020, "Optimizing millions of hyperparameters by implicit differentiation".

    >>> import torch
    >>> from equilibria import fixed_point
    >>> a = torch.ones(1, 1, requires_grad=True)
    >>> z, stats = fixed_point(lambda z, a: 0.5 * z + a, torch.zeros(1, 1), a, adjoint=Neumann(terms=3))
    >>> float(torch.autograd.grad(z.sum(), a)[0])
    1.75
    """

    terms: int = 5

    def __post_init__(self) -> None:
        check_count("Neumann", "terms", self.terms, 1)

    def solve(self, f: DeclaredFunction, z0: Tensor, args: tuple[Tensor, ...], forward: Forward) -> Solved:
        return fixed_point_of(self, f, z0, args, forward)

    def linear(self, system: LinearSystem) -> Tensor:
        u = system.g
        for _ in range(self.terms - 1):
            u = system(u)
        return u
