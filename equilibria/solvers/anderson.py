"""Anderson acceleration: the combination of past steps that makes the linearised residual smallest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from equilibria.solvers.solver import (
    Map,
    State,
    check_count,
    check_damping,
    check_factor,
    combine,
    difference,
    dots,
    in_use,
    newest,
    ring,
    solve_scaled,
    square_in_use,
    store_difference,
    store_length,
    store_products,
)
from equilibria.stopping import l2

STALL_STEPS, STALL_RATIO = 8, 0.7
"""A sample has stalled when its residual has not fallen to 0.7 of what it was in 8 steps."""
WILD = 1e4
"""A sample whose residual is so many times what it was has been carried off, also by steps that may raise it."""


@dataclass(frozen=True, kw_only=True)
class AndersonState(State):
    dg: Tensor
    """(B, m, D) differences of g between successive iterates; a ring buffer."""
    df: Tensor
    """(B, m, D) the same differences of f."""
    gram: Tensor
    """(B, m, m) dg dgᵀ; for type 1 alone, -dz dgᵀ."""
    lengths: Tensor
    """(B, m) ‖Δg‖₂, 0 for pairs that are not in use or forgotten."""
    norm: Tensor
    """(B,) ‖g‖₂."""
    expansion: Tensor
    """(B,) the largest factor by which a plain step has raised the residual, 1 at least."""
    mark: Tensor
    """(B,) the residual to which progress is compared."""
    waited: Tensor
    """(B,) steps since the mark was set."""
    age: int | Tensor
    """Pairs stored so far."""

    def pull(self, g: Tensor) -> Tensor:
        """gᵀ H = gᵀ - (ΔF g)ᵀ (ΔG ΔGᵀ)⁻¹ ΔG, the estimate of type 2, whatever steps were taken."""
        dg, df, lengths = (in_use(part, self.age) for part in (self.dg, self.df, self.lengths))
        gamma = solve_scaled(torch.bmm(dg, dg.mT), dots(df, g), lengths, 10 * torch.finfo(g.dtype).eps)
        return combine(g, gamma, dg)


@dataclass(frozen=True, kw_only=True)
class Anderson:
    """Anderson acceleration over the last `history` differences.

    z ← f(z) - Σ γᵢ Δfᵢ - (1 - damping) (g - Σ γᵢ Δgᵢ),   g = f(z) - z,   where γ solves

    type 2:  γ = argmin ‖g - Σ γᵢ Δgᵢ‖² + ridge Σ (γᵢ ‖Δgᵢ‖)²,
    type 1:  Σⱼ (Δzᵢ · Δgⱼ) γⱼ = Δzᵢ · g.

    Type 2 is fast, but where the Jacobian of g is nearly singular it rests at a least residual that is no root; type 1 is
    slower and passes such places. By default a sample takes steps of type 2; when it stalls, it forgets its differences and
    takes steps of type 1 until its residual has fallen. On a map that is far from linear, old differences mislead: a sample
    whose residual exceeds what its step of type 2 predicted forgets them too (`restart`), so that a long history does no
    harm. After forgetting comes a plain step.

    A step costs one evaluation of f and three passes over the pairs in use (five for type 1); of the Gram matrix only the
    new row is computed, except for the samples that have stalled. Memory is 2 · history states. A sample whose small system
    is singular takes a plain step.

    Source: Anderson 1965; in this difference form, both types, Fang and Saad 2009, "Two classes of multisecant methods for
    nonlinear acceleration", and Walker and Ni 2011, "Anderson acceleration for fixed-point iterations", section 2. With a
    history of d or more, a linear map of dimension d is solved within d + 2 evaluations by type 2 without restarts.

    >>> import torch
    >>> from equilibria import fixed_point
    >>> z, stats = fixed_point(lambda z: 0.5 * z + 1, torch.zeros(1, 1), solver=Anderson(history=5))
    """

    history: int = 20
    damping: float = 1.0
    ridge: float | None = None
    """Relative to ‖Δgᵢ‖² (an absolute one outweighs the system when residuals get small); None: 10 times the machine
    epsilon."""
    type: Literal[1, 2] | None = None
    """None: type 2, and type 1 for samples that have stalled, afresh where it has raised their residual 10⁴ times."""
    restart: float | None = 1.5
    """How many times ‖g - Σ γᵢ Δgᵢ‖ (or half of ‖g‖, if that is more) the residual after a step of type 2 may be before the
    sample forgets its history. Where f itself expands, as plain steps show, as much more is allowed. None: never forget."""

    traceable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_count("Anderson", "history", self.history, 1)
        check_damping("Anderson", self.damping)
        check_factor("Anderson", "restart", self.restart, 1.0)
        if self.ridge is not None and not self.ridge >= 0:
            raise ValueError(f"Anderson(ridge={self.ridge}): ridge must be >= 0, or None for the default")
        if self.type not in (1, 2, None):
            raise ValueError(f"Anderson(type={self.type!r}): type must be 1 or 2, or None for 2 and, where it stalls, 1")

    def init(self, f: Map, z0: Tensor) -> AndersonState:
        fz = f(z0)
        g = difference(fz, z0)
        batch, size = g.shape
        history = min(self.history, size)  # more pairs are linearly dependent
        dg, df = ring(g, history), ring(g, history)
        gram = g.new_zeros(batch, history, history)
        norm = l2(g.detach())
        return AndersonState(
            z=z0, fz=fz, g=g, dg=dg, df=df, gram=gram, lengths=gram[:, 0], norm=norm,
            expansion=torch.ones_like(norm), mark=norm, waited=torch.zeros_like(norm, dtype=torch.int64), age=0,
        )  # fmt: skip

    def step(self, f: Map, state: AndersonState) -> AndersonState:
        z, rest, predicted = state.fz.to(state.g.dtype), state.g, state.norm
        if isinstance(state.age, Tensor) or state.age:
            gamma, predicted = self._weights(state)
            z = combine(z, gamma, in_use(state.df, state.age))
            if self.damping != 1.0:
                rest = combine(rest, gamma, in_use(state.dg, state.age))
        if self.damping != 1.0:
            z = z - (1.0 - self.damping) * rest
        z = z.to(state.z.dtype)
        fz = f(z)
        return self._remember(state, z, fz, difference(fz, z), predicted)

    def _weights(self, state: AndersonState) -> tuple[Tensor, Tensor]:
        """(B, used) γ, and (B,) ‖g - Σ γᵢ Δgᵢ‖₂, infinite for steps of type 1: those may raise the residual."""
        dg, df, lengths = (in_use(part, state.age) for part in (state.dg, state.df, state.lengths))
        gram, rhs = square_in_use(state.gram, state.age), dots(dg, state.g)
        if self.type == 1:
            return self._solve(gram, rhs - dots(df, state.g), lengths), torch.full_like(state.norm, torch.inf)
        stalled = _stalled(state) if self.type is None else None
        traced = _unseen(state)
        if stalled is not None and traced:  # which samples have stalled is not known: all take part
            system, right = _first_type(dg, df, state.g)
            system = torch.where(stalled.view(-1, 1, 1), system, gram)
            gamma = self._solve(system, torch.where(stalled.unsqueeze(1), right, rhs), lengths)
        else:
            gamma = self._solve(gram, rhs, lengths)
        # ‖g‖² - γ · ΔG g is what γ has made least: the square asked for, and the ridge's share, which is small.
        predicted = (state.norm.square() - torch.linalg.vecdot(gamma.detach(), rhs.detach())).clamp(min=0).sqrt()
        if stalled is not None:
            predicted = torch.where(stalled, torch.inf, predicted)
            if not traced and len(rows := stalled.nonzero().squeeze(1)):
                first = self._solve(*_first_type(dg[rows], df[rows], state.g[rows]), lengths[rows])
                gamma = gamma.index_copy(0, rows, first)
        return gamma, predicted

    def _solve(self, system: Tensor, rhs: Tensor, lengths: Tensor) -> Tensor:
        ridge = 10 * torch.finfo(system.dtype).eps if self.ridge is None else self.ridge
        return solve_scaled(system, rhs, lengths, ridge)

    def _remember(self, state: AndersonState, z: Tensor, fz: Tensor, g: Tensor, predicted: Tensor) -> AndersonState:
        age = state.age
        dg = store_difference(state.dg, age, g, state.g)
        df = store_difference(state.df, age, fz, state.fz)
        new = newest(dg, age)
        row = column = dots(in_use(dg, age + 1), new)
        if self.type == 1:
            row = dots(in_use(dg, age + 1), new - newest(df, age))
            column = column - dots(in_use(df, age + 1), new)
        norm = l2(g.detach())
        length = l2(new.detach()) if self.type == 1 else newest(row.detach(), age).sqrt()
        lengths = store_length(state.lengths, age, length)
        fallen = norm <= STALL_RATIO * state.mark
        waited = (state.waited + 1).masked_fill(fallen, 0)
        plain = ~state.lengths.any(dim=1)
        expansion = torch.where(plain, torch.maximum(state.expansion, norm / state.norm), state.expansion)
        if self.restart is not None:
            kept = plain | (norm <= self.restart * state.expansion * torch.maximum(predicted, 0.5 * state.norm))
            lengths = lengths * kept.unsqueeze(1)
        if self.type is None:  # type 1 starts afresh, at first and where it was carried off
            lengths = lengths * ((waited != STALL_STEPS) & (norm <= WILD * state.mark)).unsqueeze(1)
        return AndersonState(
            z=z, fz=fz, g=g, dg=dg, df=df, gram=store_products(state.gram, age, row, column), lengths=lengths, norm=norm,
            expansion=expansion, mark=torch.where(fallen, norm, state.mark), waited=waited, age=age + 1,
        )  # fmt: skip


def _first_type(dg: Tensor, df: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """The system (B, used, used) and the right-hand side (B, used) of type 1, both times -1."""
    back = dg - df  # -Δz
    return torch.bmm(back, dg.mT), dots(back, g)


def _unseen(state: AndersonState) -> bool:
    """Whether nobody looks which samples have stalled: where one cannot, or where an accelerator would have to wait."""
    return isinstance(state.age, Tensor) or state.g.device.type != "cpu"


def _stalled(state: AndersonState) -> Tensor:
    """(B,) which samples make no progress, other than for want of digits."""
    stalled = state.waited >= STALL_STEPS
    if _unseen(state) or bool(stalled.any()):
        stalled = stalled & (state.norm > 10 * torch.finfo(state.z.dtype).eps * l2(state.fz.detach()))
    return stalled
