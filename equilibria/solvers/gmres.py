"""GMRES for affine maps: the solver of the implicit backward pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from equilibria.solvers.solver import Map, State, check_count, combine, difference, dots, recorded
from equilibria.stopping import l2


@dataclass(frozen=True, kw_only=True)
class GMRESState(State):
    origin: Tensor
    """(B, D) the z this cycle started from."""
    f_origin: Tensor
    """(B, D) f(origin)."""
    beta: Tensor
    """(B, 1) ‖f(origin) - origin‖₂."""
    basis: Tensor
    """(B, m + 1, D) orthonormal rows spanning the Krylov space; the first is the residual at the origin over beta."""
    hessenberg: Tensor
    """(B, m + 1, m) the operator I - A in that basis."""
    size: int
    """Columns of the Hessenberg matrix filled so far in this cycle."""


@dataclass(frozen=True, kw_only=True)
class GMRES:
    """Restarted GMRES for z = f(z) = A z + b: the z in origin + Krylov space with the smallest residual.

    Each sample has a Krylov space of its own. A v is had from f alone, as (f(origin + β v) - f(origin)) / β. A step costs
    one evaluation of f; every `restart` steps a new cycle starts at the present z with f evaluated there. Within a cycle
    f(z) is had by the Arnoldi relation, so the residual is exact up to rounding for an affine f and meaningless for any
    other; `fixed_point` checks it before it returns.

    Source: Saad and Schultz 1986, "GMRES: a generalized minimal residual algorithm for solving nonsymmetric linear
    systems".

    >>> import torch
    >>> from equilibria import fixed_point
    >>> z, stats = fixed_point(lambda z: 0.5 * z + 1, torch.zeros(1, 1), solver=GMRES())
    """

    restart: int = 20

    def __post_init__(self) -> None:
        check_count("GMRES", "restart", self.restart, 1)

    def init(self, f: Map, z0: Tensor) -> GMRESState:
        return self._cycle(f, z0)

    def _cycle(self, f: Map, z: Tensor) -> GMRESState:
        fz = f(z)
        g = difference(fz, z)
        beta, basis, hessenberg = krylov_space(g, self.restart)
        return GMRESState(
            z=z, fz=fz, g=g, origin=z, f_origin=fz, beta=beta, basis=basis, hessenberg=hessenberg, size=0
        )  # fmt: skip

    def step(self, f: Map, state: GMRESState) -> GMRESState:
        if state.size == self.restart:
            return self._cycle(f, state.z)
        k, dtype = state.size, state.g.dtype
        origin = state.origin.to(dtype)
        v = state.basis[:, k]
        moved = f((origin + state.beta * v).to(state.z.dtype))
        inverse_beta = torch.where(state.beta > 0, state.beta.reciprocal(), 0.0)
        w = v - (moved - state.f_origin).to(dtype) * inverse_beta  # (I - A) v
        basis, hessenberg = arnoldi(state.basis, state.hessenberg, k, w)
        y, rest = least_squares(hessenberg[:, : k + 2, : k + 1])
        weights = torch.stack((torch.nn.functional.pad(y, (0, 1)), rest), dim=1) * state.beta.unsqueeze(2)  # (B, 2, k+2)
        step, g = torch.bmm(weights, basis[:, : k + 2]).unbind(1)
        z = (origin + step).to(state.z.dtype)
        fz = (origin + step + g).to(state.z.dtype)
        return GMRESState(
            z=z, fz=fz, g=g, origin=state.origin, f_origin=state.f_origin, beta=state.beta,
            basis=basis, hessenberg=hessenberg, size=k + 1,
        )  # fmt: skip


def krylov_space(r: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """(‖r‖₂, basis, Hessenberg matrix) of the Krylov space of r (B, D), at its first vector, with room for `most` more.

    The room is not touched before it is needed: a system has no memory resident for what it does not use.
    """
    batch, width = r.shape
    beta = l2(r).unsqueeze(1)
    basis = r.new_empty(batch, most + 1, width)
    basis[:, 0] = r * torch.where(beta > 0, beta.reciprocal(), 0.0)
    return beta, basis, r.new_zeros(batch, most + 1, most)


def arnoldi(basis: Tensor, hessenberg: Tensor, k: int, w: Tensor) -> tuple[Tensor, Tensor]:
    """Arnoldi's step: both with one vector more, where w (B, D) is the operator applied to vector k of the basis.

    The vector is 0 where the space cannot grow, since it holds the solution already.
    """
    column, w = _orthogonalise(basis[:, : k + 1], w)
    norm = l2(w).unsqueeze(1)
    basis = basis.clone() if recorded(basis, w) else basis
    basis[:, k + 1] = w * torch.where(norm > 0, norm.reciprocal(), 0.0)
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


def least_squares(hessenberg: Tensor) -> tuple[Tensor, Tensor]:
    """(y, e₁ - H y) with y = argmin ‖e₁ - H y‖, for H (B, k+1, k)."""
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
