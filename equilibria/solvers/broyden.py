"""Broyden's method with limited memory, in compact form."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from equilibria.solvers.solver import Map, State, check_count, difference, write
from equilibria.stopping import l2


@dataclass(frozen=True, kw_only=True)
class BroydenState(State):
    s: Tensor
    """(B, m, D) steps Δz, each scaled to norm 1; a ring buffer."""
    df: Tensor
    """(B, m, D) the change of f along each step, with the same scaling."""
    core: Tensor
    """(B, m, m) the small system; the identity in slots not yet used."""
    age: int
    """Pairs stored so far."""


@dataclass(frozen=True, kw_only=True)
class Broyden:
    """Broyden's (good) method for g(z) = f(z) - z = 0, started from the Jacobian estimate -I.

    z ← z - H g, where H is the inverse of the estimate after the last `history` rank-one updates. With the steps
    s = Δz and y = Δg in the rows of S and Y, L the strictly lower triangle of S Sᵀ in order of time,

    z ← f(z) - ΔFᵀ γ,   (L + S Yᵀ) γ = S g,   ΔF = Y + S.

    This is the product of the rank-one updates, written as one small system (Byrd, Nocedal and Schnabel 1994,
    "Representations of quasi-Newton matrices and their use in limited memory methods", section 7, inverted by
    Sherman-Morrison-Woodbury), so that forgetting the oldest pair leaves exactly Broyden's method on those that remain,
    and memory is 2 · history states whatever the budget. A sample whose system is singular takes a plain step.

    Source: Broyden 1965; in DEQs Bai et al. 2019, section 3.1.3. With a history of 2d, a linear map of dimension d is
    solved within 2d steps (Gay 1979).

    >>> import torch
    >>> from equilibria import fixed_point
    >>> z, stats = fixed_point(lambda z: torch.cos(z), torch.zeros(1, 1), solver=Broyden(history=10))
    """

    history: int = 10
    line_search: int = 0
    """Most backtracking evaluations per step (Armijo's condition on ‖g‖², per sample); 0 takes full steps. Evaluations are
    shared by the batch, so with a line search a sample that runs out of budget may stop earlier in a harder batch."""

    def __post_init__(self) -> None:
        check_count("Broyden", "history", self.history, 1)
        check_count("Broyden", "line_search", self.line_search, 0)

    def init(self, f: Map, z0: Tensor) -> BroydenState:
        fz = f(z0)
        g = difference(fz, z0)
        batch, size = g.shape
        s = g.new_zeros(batch, self.history, size)
        core = torch.eye(self.history, dtype=g.dtype, device=g.device).expand(batch, -1, -1).contiguous()
        return BroydenState(z=z0, fz=fz, g=g, s=s, df=torch.zeros_like(s), core=core, age=0)

    def step(self, f: Map, state: BroydenState) -> BroydenState:
        used = min(state.age, self.history)
        target = state.fz.to(state.g.dtype)
        if used:
            rhs = torch.bmm(state.s[:, :used], state.g.unsqueeze(2))  # (B, used, 1)
            gamma, info = torch.linalg.solve_ex(state.core[:, :used, :used], rhs)
            sound = (info == 0) & gamma.isfinite().all(dim=(1, 2))
            gamma = torch.where(sound[:, None, None], gamma, 0.0)
            target = torch.baddbmm(target.unsqueeze(1), gamma.mT, state.df[:, :used], alpha=-1.0).squeeze(1)
        z = target.to(state.z.dtype)
        fz = f(z)
        g = difference(fz, z)
        if self.line_search:
            z, fz, g = self._backtrack(f, state, target, z, fz, g)
        return self._remember(state, z, fz, g)

    def _backtrack(
        self, f: Map, state: BroydenState, target: Tensor, z: Tensor, fz: Tensor, g: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Shorten the step of each sample until ‖g‖² <= (1 - 2·10⁻⁴ α) ‖g₀‖² (-2 ‖g₀‖² is the slope)."""
        before = l2(state.g).square()
        start = state.z.to(g.dtype)
        alpha = torch.ones_like(before)
        for _ in range(self.line_search):
            after = l2(g).square()
            short = ~(after <= (1.0 - 2e-4 * alpha) * before)  # true for NaN too
            if f.remaining <= 0 or not bool(short.any()):
                break
            # Minimum of the parabola through both values and the slope, kept within [0.1, 0.5] of the last try.
            factor = (alpha * before / (after - before + 2 * alpha * before)).nan_to_num(0.1).clamp(0.1, 0.5)
            alpha = torch.where(short, alpha * factor, alpha)
            tried = (start + alpha.unsqueeze(1) * (target - start)).to(state.z.dtype)
            z = torch.where(short.unsqueeze(1), tried, z)
            fz = f(z)
            g = difference(fz, z)
        return z, fz, g

    def _remember(self, state: BroydenState, z: Tensor, fz: Tensor, g: Tensor) -> BroydenState:
        slot = state.age % self.history
        used = min(state.age + 1, self.history)
        s = z.to(g.dtype) - state.z.to(g.dtype)
        norm = l2(s.detach()).unsqueeze(1)  # the scale cancels in the step, so it needs no gradient
        scale = torch.where(norm > 0, norm.reciprocal(), 0.0)
        s = s * scale
        df = (fz - state.fz).to(g.dtype) * scale
        y = df - s
        history_s = write(state.s, slot, s)
        history_df = write(state.df, slot, df)
        column = torch.bmm(history_s[:, :used], y.unsqueeze(2)).squeeze(2)  # s_j · y: no lower-triangle term for older j
        row = torch.bmm(history_df[:, :used], s.unsqueeze(2)).squeeze(2)  # s · (y_j + s_j) for older j
        diagonal = torch.where(norm > 0, column[:, slot : slot + 1], 1.0)
        core = state.core.clone()
        core[:, slot, :used] = row
        core[:, :used, slot] = column
        core[:, slot, slot : slot + 1] = diagonal
        return BroydenState(z=z, fz=fz, g=g, s=history_s, df=history_df, core=core, age=state.age + 1)
