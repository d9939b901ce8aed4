"""The spectral radius of ∂f/∂z: whether plain iteration contracts at this point, and how fast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from equilibria.diagnostics.linear import Linearised, orthogonalise, unit
from equilibria.solvers.solver import check_count
from equilibria.stopping import l2


class SpectralRadius(NamedTuple):
    """An estimate for each of B samples."""

    radius: Tensor
    """(B,) the largest modulus of an eigenvalue of J; NaN where J is not finite."""
    converged: Tensor
    """(B,) bool: whether the residual of the eigenvector has met the tolerance. Where it has not, the radius is the best
    guess so far, usually somewhat too small."""
    products: Tensor
    """(B,) int64: vector-Jacobian products spent."""


def spectral_radius(
    f: Callable[..., Any],
    z: Any,
    *args: Any,
    rtol: float = 1e-3,
    max_products: int = 200,
    space: int = 20,
    generator: torch.Generator | None = None,
) -> SpectralRadius:
    """ρ(J) = max |λ(J)| with J = ∂f/∂z at z, for every sample by itself.

    Picard iteration contracts near a fixed point exactly where ρ < 1, by the factor ρ per step in the end.

    Powers of J applied to a random vector turn it into the dominant eigenvectors; the eigenvalue is read off from the whole
    space that v, vJ, vJ², ... span, by Arnoldi's method with restarts. A pair of complex eigenvalues, or two of opposite
    sign, on which power iteration alone never settles, are two directions in that space. A sample is done when

    ‖yJ - λy‖ <= rtol |λ|,   ‖y‖ = 1,

    which bounds the error of λ by rtol |λ| if J is normal. Where many eigenvalues are nearly as large as the largest, it
    may settle on one of them: on random matrices of size 200, 13 % did so, with radii up to 1.6 % too small. A defective
    eigenvalue of multiplicity k is accurate to no more than the k-th root of the rounding error, by any method. If the
    powers of J vanish (J is nilpotent, as for a strictly causal f with fewer levels than `space`), the radius is exactly 0.

    Args:
        f: the map, f(z, *args) -> z. It treats samples independently.
        z: the point, usually a fixed point: a tensor (B, ...) or a structure of them.
        args: the other arguments of f.
        rtol: tolerance of the residual of the eigenvector.
        max_products: budget of vector-Jacobian products.
        space: vectors held at a time, each of the size of z.
        generator: source of the first vector, on the device of z; one of its own with a fixed seed if not given.

    Source: Arnoldi 1951; Saad 2011, "Numerical methods for large eigenvalue problems", chapter 6, for explicit restarts.

    >>> import torch
    >>> turn = torch.tensor([[0.0, -0.9], [0.9, 0.0]])  # eigenvalues ±0.9i
    >>> radius, converged, products = spectral_radius(lambda z: z @ turn, torch.zeros(1, 2))
    >>> round(float(radius), 4), bool(converged)
    (0.9, True)
    """
    return radius_of(Linearised.of(f, z, args), rtol=rtol, max_products=max_products, space=space, generator=generator)


def radius_of(
    jacobian: Linearised, *, rtol: float = 1e-3, max_products: int = 200, space: int = 20,
    generator: torch.Generator | None = None,
) -> SpectralRadius:  # fmt: skip
    """`spectral_radius` of a map that is linearised already."""
    check_count("spectral_radius", "max_products", max_products, 1)
    check_count("spectral_radius", "space", space, 2)
    if not 0.0 < rtol < 1.0:
        raise ValueError(f"spectral_radius(rtol={rtol}): rtol must lie between 0 and 1")
    batch, size = jacobian.z.shape
    v = jacobian.start(generator)
    radius = v.new_zeros(batch)
    converged = torch.zeros_like(radius, dtype=torch.bool)
    products = torch.zeros_like(radius, dtype=torch.int64)
    spent = 0
    while spent < max_products and not bool(converged.all()):
        steps = min(space, size, max_products - spent)
        basis, hessenberg = _arnoldi(jacobian, v, steps)
        found, residual, weights = _dominant(hessenberg)
        done = residual <= rtol * found
        if spent == 0:
            vanishes = _vanishes(hessenberg)
            found, done = torch.where(vanishes, 0.0, found), done | vanishes
        spent += steps
        radius = torch.where(converged, radius, found)
        products = torch.where(converged, products, spent)
        converged = converged | done
        v = unit(torch.bmm(weights.unsqueeze(1), basis[:, :steps]).squeeze(1))[0]
    return SpectralRadius(radius, converged, products)


def _arnoldi(jacobian: Linearised, v: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Orthonormal rows Q (B, m+1, D) that begin with v and span its powers, and H (B, m+1, m) with Qₘ J = Hᵀ Q."""
    basis = v.new_zeros(len(v), steps + 1, v.shape[1])
    hessenberg = v.new_zeros(len(v), steps + 1, steps)
    basis[:, 0] = v
    for k in range(steps):
        w = jacobian.pull(basis[:, k])
        hessenberg[:, : k + 1, k], w = orthogonalise(basis[:, : k + 1], w)
        basis[:, k + 1], hessenberg[:, k + 1, k] = unit(w)
    return basis, hessenberg


def _dominant(hessenberg: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """|λ| (B,) of the dominant eigenvalue in the space, the residual (B,) of its eigenvector, and weights (B, m) of a real
    vector in its invariant subspace. NaN, with an infinite residual, where J was not finite."""
    steps = hessenberg.shape[2]
    finite = hessenberg.isfinite().all(dim=2).all(dim=1)
    known = torch.where(finite.view(-1, 1, 1), hessenberg, 0.0)
    values, vectors = torch.linalg.eig(known[:, :steps].double())
    modulus, index = values.abs().max(dim=1)
    y = vectors.gather(2, index.view(-1, 1, 1).expand(-1, steps, 1)).squeeze(2)  # (B, m)
    residual = known[:, steps, steps - 1].abs() * y[:, -1].abs().to(known.dtype)
    radius = torch.where(finite, modulus.to(known.dtype), float("nan"))
    # Of a complex pair, the real part is as good a vector to go on with: with its image it spans the same plane.
    return radius, torch.where(finite, residual, float("inf")), y.real.to(known.dtype)


def _vanishes(hessenberg: Tensor) -> Tensor:
    """(B,) bool: whether some power of J maps the first, random vector of the space to zero, to rounding.

    Then J is nilpotent. Its computed eigenvalues would be roots of the rounding error, and not small at all.
    """
    steps = hessenberg.shape[2]
    least = 100 * torch.finfo(hessenberg.dtype).eps * l2(hessenberg.mT.flatten(0, 1)).view(-1, steps).amax(dim=1)
    x = torch.zeros_like(hessenberg[:, 0])
    x[:, 0] = 1.0
    vanishes = torch.zeros_like(least, dtype=torch.bool)
    for _ in range(steps):
        power = torch.bmm(hessenberg, x.unsqueeze(2)).squeeze(2)  # (B, m+1), the coordinates of the next power
        x, norm = unit(power)
        vanishes = vanishes | (norm <= least)
        x = x[:, :steps]
    return vanishes
