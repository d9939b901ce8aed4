"""GMRES for affine maps: the solver of the implicit backward pass."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from equilibria.kernels.history import combine
from equilibria.solvers.krylov import KrylovSpace
from equilibria.solvers.small_systems import inverse_of
from equilibria.solvers.solver import Map, State, check_count, difference
from equilibria.stopping import l2
from equilibria.transforms import recorded


@dataclass(frozen=True, kw_only=True)
class GMRESState(State):
    start: Tensor
    """(B, D) z0."""
    f_start: Tensor
    """(B, D) f(z0)."""
    reach: Tensor
    """(B, 1) ‖z0‖₂ + ‖f(z0)‖₂, the distance from z0 at which f is evaluated."""
    origin: Tensor
    """(B, D) the z this cycle started from."""
    moved: Tensor
    """(B, D) z - origin, before z was rounded."""
    kept: Tensor
    """(B, c, D) corrections of the last cycles, from the latest on."""
    products: Tensor
    """(B, c, D) (I - A) applied to them, of length 1; 0 where a cycle achieved nothing."""
    space: KrylovSpace
    """Of the residual at the origin under I - A; its first c directions are the corrections kept."""

    def take(self, rows: Tensor) -> GMRESState:
        return replace(super().take(rows), space=self.space.take(rows))


@dataclass(frozen=True, kw_only=True)
class GMRES:
    """Restarted GMRES for z = f(z) = A z + b: the z in origin + Krylov space with the smallest residual.

    Each sample has a Krylov space of its own. A v is had from f alone, as (f(z0 + ρ v) - f(z0)) / ρ with a large ρ, so that
    rounding is small wherever the solve has got to. A step costs one evaluation of f; every `restart` steps a new cycle
    starts at the present z with f evaluated there. Within a cycle f(z) is had by the Arnoldi relation, so the residual is
    exact up to rounding for an affine f and meaningless for any other; `fixed_point` checks it before it returns.

    What a restart forgets, above all the slow directions of a system that is nearly singular, the corrections of the last
    `keep` cycles remember: they widen the next space, at no evaluation, for (I - A) applied to a correction is how much the
    residual fell by it. Memory is restart + keep + 8 states, and 2 · keep more once there was a restart.

    Source: Saad and Schultz 1986, "GMRES: a generalized minimal residual algorithm for solving nonsymmetric linear
    systems"; corrections kept as in Hicken and Zingg 2010, "A simplified and flexible variant of GCROT for solving
    nonsymmetric linear systems".

    >>> import torch
    >>> from equilibria import fixed_point
    >>> z, stats = fixed_point(lambda z: 0.5 * z + 1, torch.zeros(1, 1), solver=GMRES())
    """

    restart: int = 20
    """Evaluations in a cycle, and Krylov vectors held."""
    keep: int = 2
    """Corrections of past cycles that widen the space."""

    def __post_init__(self) -> None:
        check_count("GMRES", "restart", self.restart, 1)
        check_count("GMRES", "keep", self.keep, 0)

    def init(self, f: Map, z0: Tensor) -> GMRESState:
        fz = f(z0)
        g = difference(fz, z0)
        nothing = g.new_zeros(len(g), 0, g.shape[1])
        room = g.new_empty(len(g), self.restart + self.keep + 1, g.shape[1])  # for all cycles
        return GMRESState(
            z=z0, fz=fz, g=g, start=z0, f_start=fz, reach=(l2(z0) + l2(fz)).unsqueeze(1), origin=z0,
            moved=torch.zeros_like(g), kept=nothing, products=nothing, space=KrylovSpace.of(g, self.restart, room),
        )  # fmt: skip

    def step(self, f: Map, state: GMRESState) -> GMRESState:
        space, count, dtype = state.space, state.kept.shape[1], state.g.dtype
        k = space.size
        if k == count + self.restart:
            return self._cycle(f, state)
        origin = state.origin.to(dtype)
        v = space.basis[:, k if k > count else 0]  # the first Krylov vector is the first of the basis
        f_there = f(torch.addcmul(state.start.to(dtype), state.reach, v).to(state.z.dtype))
        w = v - (f_there - state.f_start).to(dtype) * inverse_of(state.reach)  # (I - A) v
        space = space.extend(w)
        y, rest = space.y, space.rest
        along = torch.nn.functional.pad(y, (0, 1))  # the first Krylov direction is row 0 of the basis, the next k is row k
        if count:
            along = torch.cat((y[:, count : count + 1], torch.zeros_like(y[:, :count]), along[:, count + 1 :]), dim=1)
        moved, g = torch.bmm(torch.stack((along, rest), dim=1), space.basis[:, : k + 2]).unbind(1)
        if count:
            moved = combine(moved, -y[:, :count], state.kept)
        z = origin + moved
        fz = (z + g).to(state.z.dtype)
        return replace(state, z=z.to(state.z.dtype), fz=fz, g=g, moved=moved, space=space)

    def _cycle(self, f: Map, state: GMRESState) -> GMRESState:
        """A new cycle from the present z, which remembers the correction of the last."""
        kept, products = state.kept, state.products
        if self.keep:
            fall = state.space.beta * state.space.basis[:, 0] - state.g  # (I - A) moved
            length = l2(fall).unsqueeze(1)
            useful = length > torch.finfo(fall.dtype).eps ** 0.5 * state.space.beta  # else it is made of rounding errors
            scale = inverse_of(torch.where(useful, length, 0.0))
            kept = torch.cat(((scale * state.moved).unsqueeze(1), kept), dim=1)[:, : self.keep]
            products = torch.cat(((scale * fall).unsqueeze(1), products), dim=1)[:, : self.keep]
        fz = f(state.z)
        g = difference(fz, state.z)
        room = None if recorded(g, state.space.basis) else state.space.basis
        space = KrylovSpace.of(g, kept.shape[1] + self.restart, room)
        for product in products.unbind(1):
            space = space.extend(product)
        return replace(
            state, fz=fz, g=g, origin=state.z, moved=torch.zeros_like(g), kept=kept, products=products, space=space
        )
