"""Fixed-point iteration over two past iterates, so that every step can be undone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from equilibria.solvers.solver import Map, State, difference


@dataclass(frozen=True, kw_only=True)
class ReversibleState(State):
    before: Tensor
    """(B, D) float64, the iterate before z."""
    exact: Tensor
    """(B, D) float64, z before it was rounded to its dtype."""


@dataclass(frozen=True, kw_only=True)
class ReversiblePicard:
    """z_{n+1} = (1 - damping) z_{n-1} + damping f(z_n), with z_{-1} = z_0: undone by solving for z_{n-1}.

    The coupled pair of McCallum and Foster, y ← (1 - β) y + β f(z), z ← (1 - β) z + β f(y), written as one sequence of
    which y and z are every second term; β is the damping. Where J has an eigenvalue λ the error shrinks per evaluation by
    the larger root of μ² - βλμ - (1 - β) = 0, at best by √(1 - β), and rounding grows by one over the smaller root when a
    step is undone. Both iterates are therefore held in float64, whatever the dtype of f. A smaller damping means a slower
    solve and a safer way back.

    Source: McCallum and Foster 2025, "Reversible deep equilibrium models". Its gradient: `Reversible`.

    >>> import torch
    >>> from equilibria import fixed_point
    >>> z, stats = fixed_point(lambda z: 0.5 * z + 1, torch.zeros(1, 1), solver=ReversiblePicard())
    """

    damping: float = 0.5
    traceable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0.0 < self.damping < 1.0:
            raise ValueError(
                f"ReversiblePicard(damping={self.damping}): damping must lie strictly between 0 and 1; at 1 "
                "nothing is left of the iterate before, and the step cannot be undone"
            )

    def init(self, f: Map, z0: Tensor) -> ReversibleState:
        fz = f(z0)
        exact = z0.to(torch.float64)
        return ReversibleState(z=z0, fz=fz, g=difference(fz, z0), before=exact, exact=exact)

    def step(self, f: Map, state: ReversibleState) -> ReversibleState:
        exact = (1.0 - self.damping) * state.before + self.damping * state.fz.to(torch.float64)
        z = exact.to(state.z.dtype)
        fz = f(z)
        return ReversibleState(z=z, fz=fz, g=difference(fz, z), before=state.exact, exact=exact)
