"""The condition of the backward system u (I - J) = g: how far its solution, and with it the gradient, can be trusted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from equilibria.diagnostics.linear import Linearised, orthogonalise, unit
from equilibria.solvers.solver import check_count

CHECK_EVERY = 5
"""Steps between two looks at the singular values found so far."""


class Conditioning(NamedTuple):
    """Extreme singular values of I - J for each of B samples."""

    smallest: Tensor
    """(B,) never below the true one; ‖z - z*‖ <= ‖f(z) - z‖ / smallest, to first order."""
    largest: Tensor
    """(B,) never above the true one."""
    converged: Tensor
    """(B,) bool: whether both have met the tolerance."""
    products: Tensor
    """(B,) int64: products with J and Jᵀ spent."""

    @property
    def condition(self) -> Tensor:
        """(B,) largest / smallest, never above the true condition (rounding apart); inf where I - J is singular."""
        return self.largest / self.smallest


def backward_condition(
    f: Callable[..., Any],
    z: Any,
    *args: Any,
    rtol: float = 1e-2,
    max_products: int = 80,
    generator: torch.Generator | None = None,
) -> Conditioning:
    """The smallest and the largest singular value of I - J, with J = ∂f/∂z at z, for every sample by itself.

    The backward pass solves u (I - J) = g. A relative error ε in its right-hand side, or a relative residual ε left by its
    solver, is a relative error in u of up to ε · condition; Newton's method solves with the same matrix forward.

    By Golub-Kahan bidiagonalisation with full reorthogonalisation: orthonormal V and U with (I - J) V = U B, B bidiagonal,
    whose singular values approach those of I - J from inside. A value σ with singular vectors u, v is done when

    ‖(I - J)ᵀu - σv‖ <= rtol σ,

    and no longer changes by more than rtol; then a true singular value lies within rtol σ. The largest is found within a
    few steps, and so is the smallest where it stands apart from the others: commonly J acts strongly in few directions,
    and in the others the singular values lie near 1. After D steps, for a state of D entries, both are exact. Below machine
    epsilon times the largest, the smallest is rounding error.

    Args:
        f: the map, f(z, *args) -> z. It treats samples independently.
        z: the point, usually a fixed point: a tensor (B, ...) or a structure of them.
        args: the other arguments of f.
        rtol: tolerance of the singular values.
        max_products: budget; two products, one with J and one with Jᵀ, make a step, for which two vectors are held.
        generator: source of the first vector, on the device of z; one of its own with a fixed seed if not given.

    Source: Golub and Kahan 1965, "Calculating the singular values and pseudo-inverse of a matrix".

    >>> import torch
    >>> rates = torch.tensor([[0.5, -0.5], [0.9, 0.0]])
    >>> condition = backward_condition(lambda z, rates: rates * z, torch.zeros(2, 2), rates).condition
    >>> [round(float(value), 3) for value in condition]
    [3.0, 10.0]
    """
    return condition_of(Linearised.of(f, z, args), rtol=rtol, max_products=max_products, generator=generator)


def condition_of(
    jacobian: Linearised, *, rtol: float = 1e-2, max_products: int = 80, generator: torch.Generator | None = None
) -> Conditioning:
    """`backward_condition` of a map that is linearised already."""
    check_count("backward_condition", "max_products", max_products, 2)
    if not 0.0 < rtol < 1.0:
        raise ValueError(f"backward_condition(rtol={rtol}): rtol must lie between 0 and 1")
    batch, size = jacobian.z.shape
    steps = min(size, max_products // 2)
    space = _Bidiagonal(jacobian, steps, jacobian.start(generator))
    ends = space.v.new_full((batch, 2), float("inf"))  # the smallest and the largest, so far unknown
    converged = torch.zeros(batch, dtype=torch.bool, device=ends.device)
    products = torch.zeros(batch, dtype=torch.int64, device=ends.device)
    for step in range(1, steps + 1):
        space.extend()
        if step % CHECK_EVERY and step != steps:
            continue
        found, residual = space.ends()
        done = ((residual <= rtol * found) & ((found - ends).abs() <= rtol * found)).all(dim=1)
        done = done | ((step == size) & found.isfinite().all(dim=1))
        ends = torch.where(converged.unsqueeze(1), ends, found)
        products = torch.where(converged, products, 2 * step)
        converged = converged | done
        if bool(converged.all()):
            break
    return Conditioning(ends[:, 0], ends[:, 1], converged, products)


class _Bidiagonal:
    """(I - J) V = U B for orthonormal V, U (B, k, D) and an upper bidiagonal B (B, k, k)."""

    def __init__(self, jacobian: Linearised, steps: int, v: Tensor) -> None:
        self.jacobian = jacobian
        self.left = v.new_zeros(len(v), steps, v.shape[1])
        self.right = torch.zeros_like(self.left)
        self.matrix = v.new_zeros(len(v), steps, steps)
        self.v = v
        self.beta = v.new_zeros(len(v))
        """How the space would go on: ‖(I - J)ᵀ u‖ of the last u, orthogonal to V."""
        self.size = 0
        self._draw = torch.Generator(v.device).manual_seed(1)

    def extend(self) -> None:
        k = self.size
        self.right[:, k] = self.v
        if k:
            self.matrix[:, k - 1, k] = self.beta
        w = self.v - self.jacobian.push(self.v)
        u, self.matrix[:, k, k] = self._next(self.left[:, :k], w)
        self.left[:, k] = u
        w = u - self.jacobian.pull(u)
        self.v, self.beta = self._next(self.right[:, : k + 1], w)
        self.size += 1

    def _next(self, basis: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        """A unit vector (B, D) orthogonal to `basis`, along w if that leaves anything, and the length (B,) of w there."""
        scale = torch.linalg.vector_norm(w, dim=1)
        direction, norm = unit(orthogonalise(basis, w)[1])
        lost = norm <= 10 * torch.finfo(w.dtype).eps * scale
        if bool(lost.any()) and basis.shape[1] < w.shape[1]:  # the space is closed: go on with any other direction
            other = torch.randn(w.shape[1:], dtype=w.dtype, device=w.device, generator=self._draw)
            other = unit(orthogonalise(basis, (other / other.norm()).expand(w.shape))[1])[0]
            direction = torch.where(lost.unsqueeze(1), other, direction)
        return direction, torch.where(lost, 0.0, norm)

    def ends(self) -> tuple[Tensor, Tensor]:
        """The smallest and the largest singular value found (B, 2), and the residuals (B, 2) of their vectors."""
        matrix = self.matrix[:, : self.size, : self.size]
        finite = matrix.isfinite().all(dim=2).all(dim=1) & self.beta.isfinite()
        left, values, _ = torch.linalg.svd(torch.where(finite.view(-1, 1, 1), matrix, 0.0).double())
        ends = torch.stack((values[:, -1], values[:, 0]), dim=1).to(matrix.dtype)
        last = torch.stack((left[:, -1, -1], left[:, -1, 0]), dim=1).abs().to(matrix.dtype)
        ends = torch.where(finite.unsqueeze(1), ends, float("nan"))
        return ends, self.beta.unsqueeze(1) * last
