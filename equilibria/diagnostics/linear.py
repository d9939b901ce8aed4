"""The Jacobian of f at a point as an operator: products from both sides, and vectors to begin a Krylov space with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from equilibria.declared import Declared
from equilibria.kernels.history import combine, dots
from equilibria.products import linearize, needs_autograd
from equilibria.solvers.small_systems import inverse_of
from equilibria.stopping import l2, work_dtype
from equilibria.structure import layout_of


class Linearised:
    """J = ∂f/∂z at z (B, D), of a map of flat states. Vectors are (B, D) and in float32 at least.

    f is recorded once for each side; a product is one pass over the record.
    """

    def __init__(self, f: Callable[[Tensor], Tensor], z: Tensor) -> None:
        needs_autograd("the Jacobian of f")
        self.f = f
        self.z = z.detach()
        self.dtype = work_dtype(z.dtype)
        self._push: Callable[..., Tensor] | None = None
        self._leaf = z.detach().requires_grad_()
        with torch.enable_grad():
            self._fz = f(self._leaf)

    @staticmethod
    def of(f: Callable[..., Any], z: Any, args: Sequence[Any]) -> Linearised:
        """For a state of any structure, and the other arguments of f."""
        layout = layout_of(z)
        declared = Declared(f, layout, args, None)
        return Linearised(lambda flat: declared(flat, *declared.tensors), layout.pack(z))

    def pull(self, u: Tensor) -> Tensor:
        """u J"""
        if not self._fz.requires_grad:  # f is a constant
            return torch.zeros_like(u)
        (product,) = torch.autograd.grad(
            self._fz, self._leaf, u.to(self.z.dtype), retain_graph=True, materialize_grads=True
        )  # fmt: skip
        return product.to(self.dtype)

    def push(self, v: Tensor) -> Tensor:
        """J v"""
        with torch.no_grad():
            if self._push is None:
                self._push = linearize(self.f, self.z)[1]
            return self._push(v.to(self.z.dtype)).to(self.dtype)

    def start(self, generator: torch.Generator | None) -> Tensor:
        """(B, D) a random unit vector, the same for every sample, so that none depends on its place in the batch.

        The global random state is left alone.
        """
        if generator is None:
            generator = torch.Generator(self.z.device).manual_seed(0)
        v = torch.randn(self.z.shape[1:], dtype=self.dtype, device=self.z.device, generator=generator)
        return (v / v.norm()).expand(self.z.shape)


def unit(w: Tensor) -> tuple[Tensor, Tensor]:
    """(w / ‖w‖, ‖w‖) of every row of w (B, D); a zero stays zero."""
    norm = l2(w)
    return w * inverse_of(norm).unsqueeze(1), norm


def orthogonalise(basis: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """(coefficients (B, k), remainder) of w (B, D) against the orthonormal rows of basis (B, k, D).

    By classical Gram-Schmidt, done twice, which makes the remainder orthogonal to rounding.
    """
    first = dots(basis, w)
    w = combine(w, first, basis)
    second = dots(basis, w)
    return first + second, combine(w, second, basis)
