"""The Krylov space of every sample, and the least-squares problem in it, a direction at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from equilibria.kernels.history import combine, dots
from equilibria.solvers.small_systems import inverse_of
from equilibria.stopping import l2
from equilibria.transforms import recorded


@dataclass(frozen=True, kw_only=True)
class KrylovSpace:
    """Directions p, what an operator M makes of them, and the combination of them that brings M p nearest to r.

    With an orthonormal basis V, whose first row is r / ‖r‖, the products are M P = V H, and y = argmin ‖r - M P y‖ is the
    solution of R y = ‖r‖ Q e₁, where rotations Q bring H to an upper triangle, Q H = (R, 0). A new direction adds a column
    to H, so that one rotation more, and one column of R⁻¹, give the new y: nothing is solved anew.

    Source: Saad and Schultz 1986, "GMRES: a generalized minimal residual algorithm for solving nonsymmetric linear
    systems", section 3.2.
    """

    beta: Tensor
    """(B, 1) ‖r‖₂."""
    basis: Tensor
    """(B, m + 1 or more, D) V: one row more than directions; rows not in use have no value."""
    rotation: Tensor
    """(B, m + 1, m + 1) Q."""
    inverse: Tensor
    """(B, m, m) R⁻¹."""
    solution: Tensor
    """(B, m) y, 0 for directions that are not in use."""
    size: int
    """Directions in use."""

    @staticmethod
    def of(r: Tensor, most: int, room: Tensor | None = None) -> KrylovSpace:
        """The space of r (B, D) without a direction, and with room for `most`: in `room` (B, most + 1 or more, D), or new.

        New room is not touched before it is needed: a system has no memory resident for what it does not use.
        """
        batch, width = r.shape
        beta = l2(r).unsqueeze(1)
        basis = r.new_empty(batch, most + 1, width) if room is None else room
        basis[:, 0] = r * inverse_of(beta)
        rotation = r.new_zeros(batch, most + 1, most + 1)
        rotation[:, 0, 0] = 1.0
        inverse = r.new_zeros(batch, most, most)
        return KrylovSpace(
            beta=beta, basis=basis, rotation=rotation, inverse=inverse, solution=r.new_zeros(batch, most), size=0
        )

    @property
    def y(self) -> Tensor:
        """(B, size)"""
        return self.solution[:, : self.size]

    @property
    def rest(self) -> Tensor:
        """(B, size + 1): r - M P y, in the basis."""
        last = self.rotation[:, self.size, : self.size + 1]
        return self.beta * last[:, :1] * last

    @property
    def residual(self) -> Tensor:
        """(B,): ‖r - M P y‖ / ‖r‖."""
        return self.rotation[:, self.size, 0].abs()

    @property
    def grew(self) -> Tensor:
        """(B,): whether the last direction did not depend on those before it."""
        return self.inverse[:, self.size - 1, self.size - 1] != 0

    def extend(self, w: Tensor) -> KrylovSpace:
        """The space with one direction more, which M maps to w (B, D). The tensors of this one may be overwritten.

        Where w lies in the span of the others, the space cannot grow: the new vector is 0, and the direction is not used.
        """
        k = self.size
        column, w, before, length = _orthogonalise(self.basis[:, : k + 1], w)
        rotated = torch.bmm(self.rotation[:, : k + 1, : k + 1], column.unsqueeze(2))  # (B, k + 1, 1)
        pivot = rotated[:, k]
        dependent = torch.maximum(pivot.abs(), length) <= torch.finfo(w.dtype).eps * before
        pivot, grown = torch.where(dependent, 0.0, pivot), torch.where(dependent, 1.0, length)
        diagonal = torch.hypot(pivot, grown)
        cosine, sine = pivot / diagonal, grown / diagonal
        last = self.rotation[:, k, : k + 1].unsqueeze(1)
        rows = torch.stack((cosine, -sine), dim=1) * last
        scale = torch.where(dependent, 0.0, diagonal.reciprocal())
        above = torch.bmm(self.inverse[:, :k, :k], rotated[:, :k] * -scale.unsqueeze(1)).squeeze(2)
        new = torch.cat((above, scale), dim=1)
        # Where autograd records the solve, what it has seen must stay as it is.
        space = self._map(Tensor.clone) if recorded(self.basis, w) else self
        space.basis[:, k + 1] = w * inverse_of(length.masked_fill(dependent, 0.0))
        space.rotation[:, k : k + 2, : k + 1] = rows
        space.rotation[:, k : k + 2, k + 1] = torch.cat((sine, cosine), dim=1)
        space.inverse[:, : k + 1, k] = new
        space.solution[:, : k + 1] += new * (self.beta * rows[:, 0, :1])
        return replace(space, size=k + 1)

    def take(self, rows: Tensor) -> KrylovSpace:
        """The spaces of some samples alone."""
        return self._map(lambda value: value.index_select(0, rows))

    def _map(self, change: Callable[[Tensor], Tensor]) -> KrylovSpace:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: change(value) for name, value in values.items() if isinstance(value, Tensor)})


def _orthogonalise(basis: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(coefficients (B, k), remainder (B, D), ‖w‖₂ (B, 1), ‖remainder‖₂ (B, 1)) of w against the rows of basis (B, k, D).

    Classical Gram-Schmidt, and once more where the first pass cancelled so much that orthogonality would suffer
    ("twice is enough": Giraud, Langou, Rozloznik 2005); an accelerator would have to wait to see where, and never looks.
    """
    before = l2(w)
    column = dots(basis, w)
    w = combine(w, column, basis)
    after = l2(w)
    if w.device.type != "cpu" or bool((after < 0.5 * before).any()):
        again = dots(basis, w)
        w = combine(w, again, basis)
        column = column + again
        after = l2(w)
    return column, w, before.unsqueeze(1), after.unsqueeze(1)
