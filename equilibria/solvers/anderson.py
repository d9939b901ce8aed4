"""Anderson acceleration: the combination of past steps that makes the linearised residual smallest."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from equilibria.kernels.history import both_dots, combine, dots, store_dots
from equilibria.kernels.history.ring import in_use, newest, ring, store_difference
from equilibria.solvers.small_systems import (
    identities,
    inverse_of,
    scaled,
    solve_scaled,
    square_in_use,
    store_products,
    store_value,
)
from equilibria.solvers.solver import Map, State, check_count, check_damping, check_factor, difference
from equilibria.stopping import l2

STALL_STEPS, STALL_RATIO = 8, 0.7
"""A sample has stalled when its residual has not fallen to 0.7 of what it was in 8 steps."""
WILD = 1e4
"""A sample whose residual is so many times what it was has been carried off, also by steps that may raise it."""


LEAST_STRETCH, MOST_STRETCH, STRETCH_WEIGHT = 1.5, 3.0, 0.3
"""Steps are lengthened from the first factor on and at most by the second; the last step counts by the third."""


@dataclass(frozen=True, kw_only=True)
class AndersonState(State):
    dg: Tensor
    """(B, m, D) differences of g between successive iterates; a ring buffer."""
    df: Tensor
    """(B, m, D) the same differences of f."""
    system: Tensor
    """(B, m, m) dg dgᵀ, for type 1 alone -dz dgᵀ, scaled and with the ridge."""
    inverse: Tensor
    """(B, m) 1 / ‖Δg‖₂, 0 for pairs that are not in use or forgotten."""
    rhs: Tensor
    """(B, used) dg · g, for type 1 alone -dz · g."""
    norm: Tensor
    """(B,) ‖g‖₂."""
    expansion: Tensor
    """(B,) the largest factor by which a plain step has raised the residual, 1 at least."""
    mark: Tensor
    """(B,) the residual to which progress is compared."""
    waited: Tensor
    """(B,) steps since the mark was set."""
    stretch: Tensor
    """(B,) logarithm of the damping that would have made the last steps best, averaged over them."""
    age: int | Tensor
    """Pairs stored so far."""

    def pull(self, g: Tensor) -> Tensor:
        """gᵀ H = gᵀ - (ΔF g)ᵀ (ΔG ΔGᵀ)⁻¹ ΔG, the estimate of type 2, whatever steps were taken."""
        dg, df, inverse = (in_use(part, self.age) for part in (self.dg, self.df, self.inverse))
        system = scaled(torch.bmm(dg, dg.mT), inverse, 10 * torch.finfo(g.dtype).eps)
        return combine(g, solve_scaled(system, dots(df, g), inverse), dg)


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

    A step costs one evaluation of f and two passes over the pairs in use (four for type 1); of the Gram matrix only the
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
    damping: float | None = 1.0
    """None: 1, and up to 3 for a sample whose steps fell short of what was best: a tenth to a quarter fewer evaluations
    where the Jacobian of f is near the identity (post-norm Transformer blocks of small weights), up to a fifth more on
    rotations. A lengthened step takes one more pass."""
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
        if self.damping is not None:
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
        norm = l2(g.detach())
        inverse = g.new_zeros(batch, history)
        return AndersonState(
            z=z0, fz=fz, g=g, dg=ring(g, history), df=ring(g, history), system=identities(g, history), inverse=inverse,
            rhs=torch.zeros_like(inverse), norm=norm, expansion=torch.ones_like(norm), mark=norm,
            waited=torch.zeros_like(norm, dtype=torch.int64), stretch=torch.zeros_like(norm), age=0,
        )  # fmt: skip

    def step(self, f: Map, state: AndersonState) -> AndersonState:
        z, rest, gamma = state.fz.to(state.g.dtype), state.g, None
        beta = self._damping(state)
        if isinstance(state.age, Tensor) or state.age:
            gamma = self._weights(state)
            z = combine(z, gamma, in_use(state.df, state.age))
            if beta is not None:
                rest = combine(rest, gamma, in_use(state.dg, state.age))
        if beta is not None:
            z = torch.addcmul(z, beta.unsqueeze(1) - 1.0, rest)
        z = z.to(state.z.dtype)
        fz = f(z)
        return self._remember(state, z, fz, difference(fz, z), gamma)

    def _damping(self, state: AndersonState) -> Tensor | None:
        """(B,) the damping of the next step; None where it is 1 for all."""
        if self.damping is not None:
            return None if self.damping == 1.0 else torch.full_like(state.norm, self.damping)
        longer = state.stretch > math.log(LEAST_STRETCH)
        if not _unseen(state) and not bool(longer.any()):
            return None
        if self.type is None:
            longer = longer & ~_stalled(state)
        return torch.where(longer, state.stretch.exp().clamp(max=MOST_STRETCH), 1.0)

    def _weights(self, state: AndersonState) -> Tensor:
        """(B, used) γ"""
        system, inverse = square_in_use(state.system, state.age), in_use(state.inverse, state.age)
        if self.type is not None or not (_unseen(state) or bool(_waiting(state).any())):
            return solve_scaled(system, state.rhs, inverse)
        stalled = _stalled(state)
        dg, df = in_use(state.dg, state.age), in_use(state.df, state.age)
        if _unseen(state):  # which samples have stalled is not known: all take part
            first, right = _first_type(dg, df, state.g)
            system = torch.where(stalled.view(-1, 1, 1), scaled(first, inverse, self._ridge(system)), system)
            return solve_scaled(system, torch.where(stalled.unsqueeze(1), right, state.rhs), inverse)
        gamma = solve_scaled(system, state.rhs, inverse)
        if len(rows := stalled.nonzero().squeeze(1)):
            first, right = _first_type(dg[rows], df[rows], state.g[rows])
            first = scaled(first, inverse[rows], self._ridge(system))
            gamma = gamma.index_copy(0, rows, solve_scaled(first, right, inverse[rows]))
        return gamma

    def _ridge(self, system: Tensor) -> float:
        return 10 * torch.finfo(system.dtype).eps if self.ridge is None else self.ridge

    def _remember(self, state: AndersonState, z: Tensor, fz: Tensor, g: Tensor, gamma: Tensor | None) -> AndersonState:
        age = state.age
        overwritten = None  # Δg · g of the pair whose place is taken
        if self.damping is None and (isinstance(age, Tensor) or age >= state.dg.shape[1]):
            overwritten = torch.linalg.vecdot(newest(state.dg, age), g).detach()
        dg, rhs, row = store_dots(state.dg, age, g, state.g, g)
        df = store_difference(state.df, age, fz, state.fz)
        column, length = row, newest(row.detach(), age).sqrt()
        if self.type == 1:
            new = newest(dg, age)
            of_f, column = both_dots(in_use(df, age + 1), g, new)
            rhs, column = rhs - of_f, row - column
            row, length = dots(in_use(dg, age + 1), new - newest(df, age)), l2(new.detach())
        length = inverse_of(length)
        inverse = store_value(state.inverse, age, length)
        scale = in_use(inverse, age + 1) * length.unsqueeze(1)
        row = row * scale
        column = row if self.type != 1 else column * scale
        system = store_products(state.system, age, row, column, length, self._ridge(row))
        found = replace(
            state, z=z, fz=fz, g=g, dg=dg, df=df, system=system, inverse=inverse, rhs=rhs, norm=l2(g.detach()), age=age + 1
        )
        return self._judge(found, state, gamma, length, overwritten)

    def _best_stretch(
        self, found: AndersonState, before: AndersonState, gamma: Tensor, overwritten: Tensor | None
    ) -> Tensor:
        """(B,) `stretch` after a step of type 2.

        The step β r, r = g - Σ γᵢ Δgᵢ, has led to g' = r - β (I - J) r, were f linear. Then r · (I - J) (β* r) = r · r for
        β* = β r · r / (r · r - r · g'); both products are had from those that are known: r is at right angles to all Δgᵢ.
        """
        gamma = gamma.detach()
        products = found.rhs.detach()  # Δgᵢ · g'
        if overwritten is not None:
            products = store_value(products.clone(), before.age, overwritten)
        products = products[:, : gamma.shape[1]]
        left = before.norm.square() - torch.linalg.vecdot(gamma, before.rhs.detach())
        after = torch.linalg.vecdot(before.g.detach(), found.g.detach()) - torch.linalg.vecdot(gamma, products)
        beta = self._damping(before)
        best = (left if beta is None else left * beta) / (left - after)
        best = torch.where(left > after, best, 1.0).clamp(1.0 / MOST_STRETCH, MOST_STRETCH).log()
        return torch.lerp(before.stretch, best, STRETCH_WEIGHT)

    def _judge(
        self,
        found: AndersonState,
        before: AndersonState,
        gamma: Tensor | None,
        newest: Tensor,
        overwritten: Tensor | None,
    ) -> AndersonState:
        """Forget the pairs of samples that they misled, and of those that have waited too long for progress."""
        norm = found.norm
        enough = STALL_RATIO * before.mark
        most = enough if self.restart is None else torch.minimum(enough, 0.5 * self.restart * before.norm)
        if not _unseen(found) and bool((norm <= most).all()):  # the usual case on maps that are not hard
            return replace(found, mark=norm, waited=torch.zeros_like(before.waited))
        fallen = norm <= enough
        waited = (before.waited + 1).masked_fill(fallen, 0)
        plain = (found.inverse > 0).sum(dim=1) <= (newest > 0)  # before this step there was none
        expansion = torch.where(plain, torch.maximum(before.expansion, norm / before.norm), before.expansion)
        inverse = found.inverse
        stretch = before.stretch
        if self.damping is None and self.type != 1 and gamma is not None:
            same = norm <= most  # what is well is left as it is
            if self.type is None:
                same = same | _stalled(before)
            stretch = torch.where(same, stretch, self._best_stretch(found, before, gamma, overwritten))
        if self.restart is not None and self.type != 1 and gamma is not None:
            # ‖g‖² - γ · ΔG g is what γ has made least: the square asked for, and the ridge's share, which is small.
            explained = torch.linalg.vecdot(gamma.detach(), before.rhs.detach())
            predicted = (before.norm.square() - explained).clamp(min=0).sqrt()
            kept = plain | (norm <= self.restart * before.expansion * torch.maximum(predicted, 0.5 * before.norm))
            if self.type is None:
                kept = kept | _stalled(before)  # steps of type 1 may raise the residual
            inverse = inverse * kept.unsqueeze(1)
        if self.type is None:  # type 1 starts afresh, at first and where it was carried off
            inverse = inverse * ((waited != STALL_STEPS) & (norm <= WILD * before.mark)).unsqueeze(1)
        return replace(
            found,
            inverse=inverse,
            expansion=expansion,
            mark=torch.where(fallen, norm, before.mark),
            waited=waited,
            stretch=stretch,
        )


def _first_type(dg: Tensor, df: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """The system (B, used, used) and the right-hand side (B, used) of type 1, both times -1."""
    back = dg - df  # -Δz
    return torch.bmm(back, dg.mT), dots(back, g)


def _unseen(state: AndersonState) -> bool:
    """Whether nobody looks which samples have stalled: where one cannot, or where an accelerator would have to wait."""
    return isinstance(state.age, Tensor) or state.g.device.type != "cpu"


def _waiting(state: AndersonState) -> Tensor:
    """(B,) which samples make no progress."""
    return state.waited >= STALL_STEPS


def _stalled(state: AndersonState) -> Tensor:
    """(B,) which samples make no progress, other than for want of digits."""
    stalled = _waiting(state)
    if _unseen(state) or bool(stalled.any()):
        stalled = stalled & (state.norm > 10 * torch.finfo(state.z.dtype).eps * l2(state.fz.detach()))
    return stalled
