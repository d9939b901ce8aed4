"""Picard iteration: apply f again and again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from equilibria.solvers.solver import Map, State, check_damping, difference


@dataclass(frozen=True, kw_only=True)
class Picard:
    """z ← z + damping · (f(z) - z).

    Converges where the spectral radius of (1 - damping) I + damping J is below 1, at that rate; with damping 1 (the
    default) it is plain fixed-point iteration. Damping below 1 tames maps whose Jacobian has eigenvalues below -1.
    Holds no history: the cheapest solver in memory.

    Source: Picard 1890; damped, Krasnoselskii 1955 and Mann 1953. Kelley 1995, "Iterative methods for linear and nonlinear
    equations", section 4.1.

    >>> import torch
    >>> from equilibria import fixed_point
    >>> z, stats = fixed_point(lambda z: 0.5 * z + 1, torch.zeros(1, 1), solver=Picard())
    """

    damping: float = 1.0
    traceable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_damping("Picard", self.damping)

    def init(self, f: Map, z0: Tensor) -> State:
        return _at(f, z0)

    def step(self, f: Map, state: State) -> State:
        if self.damping == 1.0:
            return _at(f, state.fz)
        return _at(f, (state.z + self.damping * state.g).to(state.z.dtype))


def _at(f: Map, z: Tensor) -> State:
    fz = f(z)
    return State(z=z, fz=fz, g=difference(fz, z))
