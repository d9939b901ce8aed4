"""Operator splitting for monotone operator equilibrium networks: z = prox(W z + c)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import inf

import torch
from torch import Tensor

from equilibria.solvers.solver import Map, State, check_damping, difference


@dataclass(frozen=True, kw_only=True)
class PeacemanRachfordState(State):
    u: Tensor
    """(B, D) what z is the proximal point of, in float32 at least."""
    bias: Tensor
    """(B, D) c"""
    resolvent: Callable[[Tensor], Tensor]
    """v (B, D) -> (I + α (I - W))⁻¹ v"""


@dataclass(frozen=True, kw_only=True, eq=False)
class PeacemanRachford:
    """Peaceman-Rachford splitting for z = f(z) = prox(W z + c), where I - W is monotone: I - W + (I - W)ᵀ >= 2 m I, m > 0.

    z = prox(u),   v = 2 z - u,   y = (I + α (I - W))⁻¹ (v + α c),   u ← 2 y - v

    It converges for every α > 0 from every start, however large W is, to the one fixed point there is; the error of u
    shrinks at each step by ‖(I - α (I - W)) (I + α (I - W))⁻¹‖₂ < 1 at least. A step is two products with D × D matrices,
    one of them in f; the inverse is computed once per solve. u starts at z0 + α (W z0 + c - z0), so that a solution stays
    where it is.

    The f that is solved must be this very map: the residual is that of f, and gradients are those of f, not of the solver.
    `equilibria.nn.MonotoneDEQ` takes care of that.

    Raises:
        ValueError: the shapes of weight, bias and state do not belong together, or I + α (I - W) is singular.

    Source: Winston and Kolter 2020, "Monotone operator equilibrium networks", section 3.3; Peaceman and Rachford 1955;
    Lions and Mercier 1979, "Splitting algorithms for the sum of two nonlinear operators".

    >>> import torch
    >>> from equilibria import fixed_point
    >>> W, c = torch.tensor([[-1.0, -3.0], [3.0, -1.0]]), torch.ones(1, 2)
    >>> solver = PeacemanRachford(weight=W, bias=c, alpha=0.3)
    >>> z, stats = fixed_point(lambda z, W, c: torch.relu(z @ W.T + c), torch.zeros(1, 2), W, c, solver=solver)
    >>> bool(stats.converged.all())
    True
    """

    weight: Tensor = field(repr=False)
    """(D, D) W"""
    bias: Tensor = field(repr=False)
    """(B, D) c, a row for each sample of the state."""
    alpha: float = 1.0
    """Step size. The solution does not depend on it; for a symmetric W, 1 / √(m ‖I - W‖₂) is the fastest."""
    damping: float = 1.0
    """u ← u + damping · (the new u - u); 0.5 is Douglas-Rachford splitting, which converges for m = 0 too."""
    prox: Callable[[Tensor], Tensor] = torch.relu
    """u -> argmin_z ½ ‖z - u‖² + α φ(z), for the convex φ with f(z) = prox_φ(W z + c). For relu the
    same for all α; for α = 1 it is that nonlinearity itself."""

    def __post_init__(self) -> None:
        check_damping("PeacemanRachford", self.damping)
        if not 0.0 < self.alpha < inf:
            raise ValueError(f"PeacemanRachford(alpha={self.alpha}): alpha must be a finite number > 0")
        if self.weight.dim() != 2 or self.bias.dim() != 2 or self.weight.shape != (self.bias.shape[1],) * 2:
            raise ValueError(
                f"PeacemanRachford has a weight of shape {tuple(self.weight.shape)} and a bias of shape "
                f"{tuple(self.bias.shape)}; give weight (D, D) and bias (B, D), a row for each sample"
            )

    def init(self, f: Map, z0: Tensor) -> PeacemanRachfordState:
        if z0.shape != self.bias.shape:
            raise ValueError(
                f"PeacemanRachford has a bias of shape {tuple(self.bias.shape)} for a state of shape {tuple(z0.shape)}; "
                "give a row for each sample of the state. Under torch.vmap many batches are solved as one, which a bias "
                "given beforehand cannot follow: pass the larger batch yourself, or use Anderson()"
            )
        fz = f(z0)
        g = difference(fz, z0)
        weight, bias, z = self.weight.to(g.dtype), self.bias.to(g.dtype), z0.to(g.dtype)
        identity = torch.eye(len(weight), dtype=g.dtype, device=g.device)
        inverse, info = torch.linalg.inv_ex(identity + self.alpha * (identity - weight))
        if bool(info):
            raise ValueError(
                "PeacemanRachford: I + alpha (I - W) is singular, so I - W is not monotone; make W monotone with "
                "equilibria.nn.monotone, or use Anderson() or Broyden()"
            )
        u = z + self.alpha * (z @ weight.mT + bias - z)
        return PeacemanRachfordState(z=z0, fz=fz, g=g, u=u, bias=bias, resolvent=lambda v: v @ inverse.mT)

    def step(self, f: Map, state: PeacemanRachfordState) -> PeacemanRachfordState:
        v = 2.0 * self.prox(state.u) - state.u
        y = state.resolvent(v + self.alpha * state.bias)
        u = state.u + self.damping * (2.0 * y - v - state.u)
        z = self.prox(u).to(state.z.dtype)
        fz = f(z)
        return replace(state, z=z, fz=fz, g=difference(fz, z), u=u)
