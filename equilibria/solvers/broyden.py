"""Broyden's method with limited memory, in compact form."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from equilibria.kernels.history import both_dots, combine, dots
from equilibria.kernels.history.ring import in_use, newest, ring, store_difference
from equilibria.solvers.line_search import backtrack
from equilibria.solvers.small_systems import (
    identities,
    inverse_of,
    solve_scaled,
    square_in_use,
    store_products,
    store_value,
)
from equilibria.solvers.solver import Map, State, check_count, check_factor, difference
from equilibria.stopping import l2


@dataclass(frozen=True, kw_only=True)
class BroydenState(State):
    s: Tensor
    """(B, m, D) steps Δz; a ring buffer."""
    df: Tensor
    """(B, m, D) the change of f along each step."""
    core: Tensor
    """(B, m, m) L + S Yᵀ, scaled."""
    inverse: Tensor
    """(B, m) 1 / ‖s‖₂, 0 for pairs that are not in use or forgotten."""
    rhs: Tensor
    """(B, used) s · g."""
    best: Tensor | None
    """(B,) the smallest ‖g‖₂ so far, if `divergence` is given."""
    best_z: Tensor | None
    """(B, D) the z that has it."""
    best_fz: Tensor | None
    """(B, D) f(best_z)."""
    age: int | Tensor
    """Pairs stored so far."""

    def pull(self, g: Tensor) -> Tensor:
        """gᵀ H = gᵀ - (ΔF g)ᵀ (L + S Yᵀ)⁻¹ S."""
        s, df, inverse = (in_use(part, self.age) for part in (self.s, self.df, self.inverse))
        return combine(g, solve_scaled(square_in_use(self.core, self.age).mT, dots(df, g), inverse), s)


@dataclass(frozen=True, kw_only=True)
class Broyden:
    """Broyden's (good) method for g(z) = f(z) - z = 0, started from the Jacobian estimate -I.

    z ← z - H g, where H is the inverse of the estimate after the last `history` rank-one updates. With the steps
    s = Δz and y = Δg in the rows of S and Y, L the strictly lower triangle of S Sᵀ in order of time,

    z ← f(z) - ΔFᵀ γ,   (L + S Yᵀ) γ = S g,   ΔF = Y + S.

    This is the product of the rank-one updates, written as one small system (Byrd, Nocedal and Schnabel 1994,
    "Representations of quasi-Newton matrices and their use in limited memory methods", section 7, inverted by
    Sherman-Morrison-Woodbury), so that forgetting the oldest pair leaves exactly Broyden's method on those that remain,
    and memory is 2 · history states whatever the budget. A sample whose system is singular takes a plain step. A sample
    that diverges can be put back to its best iterate (`divergence`).

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

    storage: torch.dtype | None = None
    """The dtype in which pairs are kept, such as torch.bfloat16 for half the memory of float32; None: float32 at least.
    Products are taken in float32 at least whatever the storage, and row by row, which is slower."""
    divergence: float | None = None
    """A sample whose ‖g‖ exceeds its smallest so far by this factor, or is not finite, goes back to its best iterate and
    forgets all pairs but the newest, which tells where not to go; that costs two more states of memory. It keeps maps that
    grow fast from overflowing. On the way to a root the residual may rise a thousandfold: give 1e4 or more. None: never, so
    that a map that is not finite shows."""

    def __post_init__(self) -> None:
        check_count("Broyden", "history", self.history, 1)
        check_count("Broyden", "line_search", self.line_search, 0)
        check_factor("Broyden", "divergence", self.divergence, 1.0)
        if self.storage is not None and not getattr(self.storage, "is_floating_point", False):
            raise TypeError(f"Broyden(storage={self.storage!r}): storage must be a floating dtype such as torch.bfloat16")

    @property
    def traceable(self) -> bool:
        return self.line_search == 0

    def init(self, f: Map, z0: Tensor) -> BroydenState:
        fz = f(z0)
        g = difference(fz, z0)
        s, df = ring(g, self.history, self.storage), ring(g, self.history, self.storage)
        inverse = g.new_zeros(len(g), self.history)
        best, best_z, best_fz = (None, None, None) if self.divergence is None else (l2(g.detach()), z0, fz)
        return BroydenState(
            z=z0, fz=fz, g=g, s=s, df=df, core=identities(g, self.history), inverse=inverse, rhs=torch.zeros_like(inverse),
            best=best, best_z=best_z, best_fz=best_fz, age=0,
        )  # fmt: skip

    def step(self, f: Map, state: BroydenState) -> BroydenState:
        target = state.fz.to(state.g.dtype)
        if isinstance(state.age, Tensor) or state.age:
            gamma = solve_scaled(square_in_use(state.core, state.age), state.rhs, in_use(state.inverse, state.age))
            target = combine(target, gamma, in_use(state.df, state.age))
        return self._remember(state, *backtrack(f, state, target, self.line_search))

    def _remember(self, state: BroydenState, z: Tensor, fz: Tensor, g: Tensor) -> BroydenState:
        age, lost = state.age, None
        best, best_z, best_fz = state.best, state.best_z, state.best_fz
        if self.divergence is not None and best is not None:
            norm = l2(g.detach())
            lost = ~(norm <= self.divergence * best)  # true for NaN too
            z, fz, g = _back_to_best(~norm.isfinite(), state, z, fz, g)  # before they spoil the pairs
        s = store_difference(state.s, age, z, state.z)
        df = store_difference(state.df, age, fz, state.fz)
        # What was stored counts, not what was rounded to it.
        new, change = newest(s, age).to(g.dtype), newest(df, age).to(g.dtype)
        row = dots(in_use(df, age + 1), new)  # s · (y_j + s_j) for older j
        inverse, length = state.inverse, inverse_of(l2(new.detach()))
        if lost is not None and best is not None:
            inverse = torch.where(lost.unsqueeze(1), 0.0, inverse)  # all but the newest, which tells where not to go
            z, fz, g = _back_to_best(lost, state, z, fz, g)
            norm = l2(g.detach())
            best_z, best_fz, _ = _back_to_best(norm > best, state, z, fz, g)
            best = torch.fmin(norm, best)
        rhs, column = both_dots(in_use(s, age + 1), g, change - new)  # s_j · y: older j have no term of L here
        inverse = store_value(inverse, age, length)
        scale = in_use(inverse, age + 1) * length.unsqueeze(1)
        core = store_products(state.core, age, row * scale, column * scale, length)
        return BroydenState(
            z=z, fz=fz, g=g, s=s, df=df, core=core, inverse=inverse, rhs=rhs, best=best, best_z=best_z, best_fz=best_fz,
            age=age + 1,
        )  # fmt: skip


def _back_to_best(rows: Tensor, state: BroydenState, z: Tensor, fz: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """z, f(z) and g, and in some rows (B,) those of the best iterate."""
    assert state.best_z is not None
    assert state.best_fz is not None
    rows, best_g = rows.unsqueeze(1), difference(state.best_fz, state.best_z)
    return torch.where(rows, state.best_z, z), torch.where(rows, state.best_fz, fz), torch.where(rows, best_g, g)
