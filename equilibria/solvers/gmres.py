"""GMRES for affine maps: the solver of the implicit backward pass."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from equilibria.solvers.solver import Map, State, check_count, combine, difference, dots, inverse_of, recorded
from equilibria.stopping import l2


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
    beta: Tensor
    """(B, 1) ‖f(origin) - origin‖₂."""
    moved: Tensor
    """(B, D) z - origin, before z was rounded."""
    kept: Tensor
    """(B, c, D) corrections of the last cycles, from the latest on."""
    products: Tensor
    """(B, c, D) (I - A) applied to them, of length 1; 0 where a cycle achieved nothing."""
    basis: Tensor
    """(B, c + m + 1, D) orthonormal rows; the first is the residual at the origin over beta, then c span the products."""
    hessenberg: Tensor
    """(B, c + m + 1, c + m) in that basis, (I - A) applied to the corrections kept and to the Krylov vectors."""
    size: int
    """Columns of the Hessenberg matrix filled so far in this cycle."""


@dataclass(frozen=True, kw_only=True)
class GMRES:
    """Restarted GMRES for z = f(z) = A z + b: the z in origin + Krylov space with the smallest residual.

    Each sample has a Krylov space of its own. A v is had from f alone, as (f(z0 + ρ v) - f(z0)) / ρ with a large ρ, so that
    rounding is small wherever the solve has got to. A step costs one evaluation of f; every `restart` steps a new cycle
    starts at the present z with f evaluated there. Within a cycle f(z) is had by the Arnoldi relation, so the residual is
    exact up to rounding for an affine f and meaningless for any other; `fixed_point` checks it before it returns.

    What a restart forgets, above all the slow directions of a system that is nearly singular, the corrections of the last
    `keep` cycles remember: they widen the next space, at no evaluation, for (I - A) applied to a correction is how much the
    residual fell by it. Memory is restart + 8 states, and 2 · keep more once there was a restart.

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
        beta, basis, hessenberg = krylov_space(g, self.restart)
        nothing = g.new_zeros(len(g), 0, g.shape[1])
        return GMRESState(
            z=z0, fz=fz, g=g, start=z0, f_start=fz, reach=(l2(z0) + l2(fz)).unsqueeze(1), origin=z0, beta=beta,
            moved=torch.zeros_like(g), kept=nothing, products=nothing, basis=basis, hessenberg=hessenberg, size=0,
        )  # fmt: skip

    def step(self, f: Map, state: GMRESState) -> GMRESState:
        k, count, dtype = state.size, state.kept.shape[1], state.g.dtype
        if k == count + self.restart:
            return self._cycle(f, state)
        origin = state.origin.to(dtype)
        v = state.basis[:, k if k > count else 0]  # the first Krylov vector is the first of the basis
        f_there = f((state.start.to(dtype) + state.reach * v).to(state.z.dtype))
        inverse = inverse_of(state.reach)
        w = v - (f_there - state.f_start).to(dtype) * inverse  # (I - A) v
        basis, hessenberg = arnoldi(state.basis, state.hessenberg, k, w)
        y, rest = least_squares(hessenberg[:, : k + 2, : k + 1], state.beta)
        of_basis = torch.cat((y[:, count : count + 1], torch.zeros_like(y[:, :count]), y[:, count + 1 :]), dim=1)
        weights = torch.stack((torch.nn.functional.pad(of_basis, (0, 1)), rest), dim=1) * state.beta.unsqueeze(2)
        moved, g = torch.bmm(weights, basis[:, : k + 2]).unbind(1)
        if count:
            moved = combine(moved, -state.beta * y[:, :count], state.kept)
        z = (origin + moved).to(state.z.dtype)
        fz = (origin + moved + g).to(state.z.dtype)
        return replace(state, z=z, fz=fz, g=g, moved=moved, basis=basis, hessenberg=hessenberg, size=k + 1)

    def _cycle(self, f: Map, state: GMRESState) -> GMRESState:
        """A new cycle from the present z, which remembers the correction of the last."""
        kept, products = state.kept, state.products
        if self.keep:
            fall = state.beta * state.basis[:, 0] - state.g  # (I - A) moved
            length = l2(fall).unsqueeze(1)
            useful = length > torch.finfo(fall.dtype).eps ** 0.5 * state.beta  # else it is made of rounding errors
            scale = inverse_of(torch.where(useful, length, 0.0))
            kept = torch.cat(((scale * state.moved).unsqueeze(1), kept), dim=1)[:, : self.keep]
            products = torch.cat(((scale * fall).unsqueeze(1), products), dim=1)[:, : self.keep]
        count = kept.shape[1]
        fz = f(state.z)
        g = difference(fz, state.z)
        beta, basis, hessenberg = krylov_space(g, count + self.restart)
        for j in range(count):
            basis, hessenberg = arnoldi(basis, hessenberg, j, products[:, j])
            # A column of zeros would make the small system singular; a row of its own leaves its coefficient at 0.
            hessenberg[:, j + 1, j] += products[:, j].eq(0).all(dim=1)
        return replace(
            state, fz=fz, g=g, origin=state.z, beta=beta, moved=torch.zeros_like(g), kept=kept, products=products,
            basis=basis, hessenberg=hessenberg, size=count,
        )  # fmt: skip


def krylov_space(r: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """(‖r‖₂, basis, Hessenberg matrix) of the Krylov space of r (B, D), at its first vector, with room for `most` more.

    The room is not touched before it is needed: a system has no memory resident for what it does not use.
    """
    batch, width = r.shape
    beta = l2(r).unsqueeze(1)
    basis = r.new_empty(batch, most + 1, width)
    basis[:, 0] = r * inverse_of(beta)
    return beta, basis, r.new_zeros(batch, most + 1, most)


def arnoldi(basis: Tensor, hessenberg: Tensor, k: int, w: Tensor) -> tuple[Tensor, Tensor]:
    """Arnoldi's step: both with one vector more, where w (B, D) is the operator applied to direction k of the space.

    The vector is 0 where w lies in the span of the others: the space cannot grow, for it holds the solution already.
    """
    column, w = _orthogonalise(basis[:, : k + 1], w)
    norm = l2(w).unsqueeze(1)
    basis = basis.clone() if recorded(basis, w) else basis
    basis[:, k + 1] = w * inverse_of(norm)
    hessenberg = hessenberg.clone()
    hessenberg[:, : k + 1, k] = column
    hessenberg[:, k + 1, k : k + 1] = norm
    return basis, hessenberg


def _orthogonalise(basis: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """(coefficients, remainder) of w (B, D) against the rows of basis (B, k, D).

    Classical Gram-Schmidt, and once more where the first pass cancelled so much that orthogonality would suffer
    ("twice is enough": Giraud, Langou, Rozloznik 2005).
    """
    before = l2(w)
    column = dots(basis, w)
    w = combine(w, column, basis)
    if bool((l2(w) < 0.5 * before).any()):
        again = dots(basis, w)
        w = combine(w, again, basis)
        column = column + again
    return column, w


def least_squares(hessenberg: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """(y, e₁ - H y) with y = argmin ‖e₁ - H y‖, for H (B, k+1, k).

    Where the length beta (B, 1) of the right-hand side is 0, so is H, whose decomposition has no derivative; y does not
    matter there, and another matrix is taken.
    """
    identity = torch.eye(*hessenberg.shape[1:], dtype=hessenberg.dtype, device=hessenberg.device)
    hessenberg = torch.where((beta == 0).unsqueeze(2), identity, hessenberg)
    q, r = torch.linalg.qr(hessenberg)
    rhs = q[:, 0, :].unsqueeze(2)  # Qᵀ e₁
    # After an exact solve the space cannot grow: its columns are zero, and their coefficients are set to zero.
    diagonal = r.diagonal(dim1=1, dim2=2)
    floor = torch.finfo(r.dtype).eps * diagonal.abs().amax(dim=1, keepdim=True)
    dead = diagonal.abs() <= floor
    r = r + torch.diag_embed(dead.to(r.dtype))
    rhs = torch.where(dead.unsqueeze(2), 0.0, rhs)
    y = torch.linalg.solve_triangular(r, rhs, upper=True)
    rest = -torch.bmm(hessenberg, y).squeeze(2)
    return y.squeeze(2), torch.cat((rest[:, :1] + 1.0, rest[:, 1:]), dim=1)
