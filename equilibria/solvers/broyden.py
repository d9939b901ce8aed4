"""Broyden's method with limited memory, in compact form."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from equilibria.solvers.line_search import backtrack
from equilibria.solvers.solver import (
    Map,
    State,
    check_count,
    combine,
    difference,
    dots,
    in_use,
    newest,
    solve_scaled,
    square_in_use,
    store_difference,
    store_length,
    store_products,
)
from equilibria.stopping import l2


@dataclass(frozen=True, kw_only=True)
class BroydenState(State):
    s: Tensor
    """(B, m, D) steps Δz; a ring buffer."""
    df: Tensor
    """(B, m, D) the change of f along each step."""
    core: Tensor
    """(B, m, m) L + S Yᵀ"""
    lengths: Tensor
    """(B, m) ‖s‖₂, 0 for slots not in use."""
    age: int | Tensor
    """Pairs stored so far."""

    def pull(self, g: Tensor) -> Tensor:
        """gᵀ H = gᵀ - (ΔF g)ᵀ (L + S Yᵀ)⁻¹ S."""
        s, df, lengths = (in_use(part, self.age) for part in (self.s, self.df, self.lengths))
        return combine(g, solve_scaled(square_in_use(self.core, self.age).mT, dots(df, g), lengths), s)


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

    @property
    def traceable(self) -> bool:
        return self.line_search == 0

    def init(self, f: Map, z0: Tensor) -> BroydenState:
        fz = f(z0)
        g = difference(fz, z0)
        batch, size = g.shape
        s = g.new_zeros(batch, self.history, size)
        core = g.new_zeros(batch, self.history, self.history)
        return BroydenState(z=z0, fz=fz, g=g, s=s, df=torch.zeros_like(s), core=core, lengths=core[:, 0], age=0)

    def step(self, f: Map, state: BroydenState) -> BroydenState:
        target = state.fz.to(state.g.dtype)
        if isinstance(state.age, Tensor) or state.age:
            rhs = dots(in_use(state.s, state.age), state.g)
            gamma = solve_scaled(square_in_use(state.core, state.age), rhs, in_use(state.lengths, state.age))
            target = combine(target, gamma, in_use(state.df, state.age))
        return self._remember(state, *backtrack(f, state, target, self.line_search))

    def _remember(self, state: BroydenState, z: Tensor, fz: Tensor, g: Tensor) -> BroydenState:
        age = state.age
        s = store_difference(state.s, age, z, state.z)
        df = store_difference(state.df, age, fz, state.fz)
        # What was stored counts, not what was rounded to it.
        new, change = newest(s, age).to(g.dtype), newest(df, age).to(g.dtype)
        row = dots(in_use(df, age + 1), new)  # s · (y_j + s_j) for older j
        column = dots(in_use(s, age + 1), change - new)  # s_j · y: older j have no term of L here
        lengths = store_length(state.lengths, age, l2(new.detach()))
        core = store_products(state.core, age, row, column)
        return BroydenState(z=z, fz=fz, g=g, s=s, df=df, core=core, lengths=lengths, age=age + 1)
