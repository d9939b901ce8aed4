"""Anderson acceleration: the combination of past steps that makes the linearised residual smallest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from equilibria.solvers.solver import Map, State, check_count, check_damping, difference, write
from equilibria.stopping import l2


@dataclass(frozen=True, kw_only=True)
class AndersonState(State):
    dg: Tensor
    """(B, m, D) differences of g between successive iterates, each scaled to norm 1; a ring buffer."""
    df: Tensor
    """(B, m, D) the same differences of f, with the same scaling."""
    gram: Tensor
    """(B, m, m) dg dgᵀ; 1 on the diagonal, also of slots not yet used."""
    rhs: Tensor
    """(B, m) dg · g."""
    age: int
    """Pairs stored so far."""


@dataclass(frozen=True, kw_only=True)
class Anderson:
    """Type-II Anderson acceleration over the last `history` differences.

    γ = argmin ‖g - Σ γᵢ Δgᵢ‖² + ridge ‖γ‖²,   z ← f(z) - Σ γᵢ Δfᵢ - (1 - damping) (g - Σ γᵢ Δgᵢ),

    with g = f(z) - z. The Δgᵢ are scaled to norm 1, so that the ridge is relative: an absolute one outweighs the system
    when residuals get small, and the solve stalls. A step costs one evaluation of f and two passes over the history;
    of the Gram matrix only the new row is computed. A sample whose small system is singular takes a plain step.

    Source: Anderson 1965; in this difference form Walker and Ni 2011, "Anderson acceleration for fixed-point iterations",
    section 2. With a history of d or more, a linear map of dimension d is solved within d + 2 evaluations.

    >>> import torch
    >>> from equilibria import fixed_point
    >>> z, stats = fixed_point(lambda z: 0.5 * z + 1, torch.zeros(1, 1), solver=Anderson(history=5))
    """

    history: int = 5
    damping: float = 1.0
    ridge: float | None = None
    """Relative to the unit diagonal of the Gram matrix; None: 10 times the machine epsilon of the small system."""

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
        gram = torch.eye(self.history, dtype=g.dtype, device=g.device).expand(batch, -1, -1).contiguous()
        rhs = g.new_zeros(batch, self.history)
        return AndersonState(z=z0, fz=fz, g=g, dg=dg, df=torch.zeros_like(dg), gram=gram, rhs=rhs, age=0)

    def step(self, f: Map, state: AndersonState) -> AndersonState:
        used = min(state.age, self.history)
        z = state.fz.to(state.g.dtype)
        if used:
            gamma = self._weights(state, used)  # (B, 1, used)
            z = torch.baddbmm(z.unsqueeze(1), gamma, state.df[:, :used], alpha=-1.0).squeeze(1)
            if self.damping != 1.0:
                rest = torch.baddbmm(state.g.unsqueeze(1), gamma, state.dg[:, :used], alpha=-1.0).squeeze(1)
                z = z - (1.0 - self.damping) * rest
        elif self.damping != 1.0:
            z = z - (1.0 - self.damping) * state.g
        z = z.to(state.z.dtype)
        fz = f(z)
        return self._remember(state, z, fz, difference(fz, z))

    def _weights(self, state: AndersonState, used: int) -> Tensor:
        """γ: the regularised normal equations, and 0 for samples whose system is singular or not finite."""
        gram = state.gram[:, :used, :used]
        ridge = 10 * torch.finfo(gram.dtype).eps if self.ridge is None else self.ridge
        system = gram + ridge * torch.eye(used, dtype=gram.dtype, device=gram.device)
        gamma, info = torch.linalg.solve_ex(system, state.rhs[:, :used].unsqueeze(-1))
        sound = (info == 0) & gamma.isfinite().all(dim=(1, 2))
        return torch.where(sound[:, None, None], gamma, 0.0).mT

    def _remember(self, state: AndersonState, z: Tensor, fz: Tensor, g: Tensor) -> AndersonState:
        slot = state.age % self.history
        used = min(state.age + 1, self.history)
        dg = g - state.g
        norm = l2(dg.detach()).unsqueeze(1)  # the scale cancels in the step, so it needs no gradient
        scale = torch.where(norm > 0, norm.reciprocal(), 0.0)
        dg = dg * scale
        df = (fz - state.fz).to(g.dtype) * scale
        history_g = write(state.dg, slot, dg)
        products = torch.bmm(history_g[:, :used], torch.stack((dg, g), dim=2))  # (B, used, 2)
        row = products[:, :, 0]
        row = torch.cat((row[:, :slot], torch.ones_like(norm), row[:, slot + 1 :]), dim=1)
        gram = state.gram.clone()
        gram[:, slot, :used] = row
        gram[:, :used, slot] = row
        return AndersonState(
            z=z, fz=fz, g=g, dg=history_g, df=write(state.df, slot, df),
            gram=gram, rhs=products[:, :, 1], age=state.age + 1,
        )  # fmt: skip
