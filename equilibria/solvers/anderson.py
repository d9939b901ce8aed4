"""Anderson acceleration: the combination of past steps that makes the linearised residual smallest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from equilibria.solvers.solver import (
    Map,
    State,
    check_count,
    check_damping,
    combine,
    difference,
    dots,
    solve_scaled,
    store_difference,
)


@dataclass(frozen=True, kw_only=True)
class AndersonState(State):
    dg: Tensor
    """(B, m, D) differences of g between successive iterates; a ring buffer."""
    df: Tensor
    """(B, m, D) the same differences of f."""
    gram: Tensor
    """(B, m, m) dg dgᵀ"""
    age: int
    """Pairs stored so far."""

    def pull(self, g: Tensor) -> Tensor:
        """gᵀ H = gᵀ - (ΔF g)ᵀ (ΔG ΔGᵀ)⁻¹ ΔG."""
        lengths = self.gram.diagonal(dim1=1, dim2=2).sqrt()
        gamma = solve_scaled(self.gram, dots(self.df, g), lengths, 10 * torch.finfo(g.dtype).eps)
        return combine(g, gamma, self.dg)


@dataclass(frozen=True, kw_only=True)
class Anderson:
    """Type-II Anderson acceleration over the last `history` differences.

    γ = argmin ‖g - Σ γᵢ Δgᵢ‖² + ridge Σ (γᵢ ‖Δgᵢ‖)²,   z ← f(z) - Σ γᵢ Δfᵢ - (1 - damping) (g - Σ γᵢ Δgᵢ),

    with g = f(z) - z. The ridge is relative to ‖Δgᵢ‖²: an absolute one outweighs the system when residuals get small, and
    the solve stalls. A step costs one evaluation of f and three passes over the history; of the Gram matrix only the new
    row is computed. A sample whose small system is singular takes a plain step.

    Source: Anderson 1965; in this difference form Walker and Ni 2011, "Anderson acceleration for fixed-point iterations",
    section 2. With a history of d or more, a linear map of dimension d is solved within d + 2 evaluations.

    >>> import torch
    >>> from equilibria import fixed_point
    >>> z, stats = fixed_point(lambda z: 0.5 * z + 1, torch.zeros(1, 1), solver=Anderson(history=5))
    """

    history: int = 5
    damping: float = 1.0
    ridge: float | None = None
    """Relative to the diagonal of the Gram matrix; None: 10 times its machine epsilon."""

    def __post_init__(self) -> None:
        check_count("Anderson", "history", self.history, 1)
        check_damping("Anderson", self.damping)
        if self.ridge is not None and not self.ridge >= 0:
            raise ValueError(f"Anderson(ridge={self.ridge}): ridge must be >= 0, or None for the default")

    def init(self, f: Map, z0: Tensor) -> AndersonState:
        fz = f(z0)
        g = difference(fz, z0)
        batch, size = g.shape
        dg = g.new_zeros(batch, self.history, size)
        gram = g.new_zeros(batch, self.history, self.history)
        return AndersonState(z=z0, fz=fz, g=g, dg=dg, df=torch.zeros_like(dg), gram=gram, age=0)

    def step(self, f: Map, state: AndersonState) -> AndersonState:
        used = min(state.age, self.history)
        z, rest = state.fz.to(state.g.dtype), state.g
        if used:
            gamma = self._weights(state.gram[:, :used, :used], dots(state.dg[:, :used], state.g))
            z = combine(z, gamma, state.df[:, :used])
            if self.damping != 1.0:
                rest = combine(rest, gamma, state.dg[:, :used])
        if self.damping != 1.0:
            z = z - (1.0 - self.damping) * rest
        z = z.to(state.z.dtype)
        fz = f(z)
        return self._remember(state, z, fz, difference(fz, z))

    def _weights(self, gram: Tensor, rhs: Tensor) -> Tensor:
        """(B, used): γ from the regularised normal equations."""
        ridge = 10 * torch.finfo(gram.dtype).eps if self.ridge is None else self.ridge
        lengths = gram.detach().diagonal(dim1=1, dim2=2).sqrt()
        return solve_scaled(gram, rhs, lengths, ridge)

    def _remember(self, state: AndersonState, z: Tensor, fz: Tensor, g: Tensor) -> AndersonState:
        slot = state.age % self.history
        used = min(state.age + 1, self.history)
        dg = store_difference(state.dg, slot, g, state.g)
        df = store_difference(state.df, slot, fz, state.fz)
        row = dots(dg[:, :used], dg[:, slot])
        gram = state.gram.clone()
        gram[:, slot, :used] = row
        gram[:, :used, slot] = row
        return AndersonState(z=z, fz=fz, g=g, dg=dg, df=df, gram=gram, age=state.age + 1)
