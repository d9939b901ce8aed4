"""Newton's method with a Krylov method inside: Jacobian-vector products, and never a Jacobian."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from equilibria.kernels.history import combine
from equilibria.solvers.krylov import KrylovSpace
from equilibria.solvers.line_search import backtrack
from equilibria.solvers.solver import Map, State, check_count, difference
from equilibria.stopping import l2


@dataclass(frozen=True, kw_only=True)
class NewtonKrylovState(State):
    forcing: Tensor
    """(B,) η of the next step."""
    jacobian: list[Callable[[Tensor], Tensor]]
    """v -> J v at z, where it is known already. The next step takes it out, so that one record of f is alive at a time."""

    def take(self, rows: Tensor) -> NewtonKrylovState:
        """The state of some samples alone; their Jacobian must be had anew."""
        return replace(super().take(rows), jacobian=[])


@dataclass(frozen=True, kw_only=True)
class NewtonKrylov:
    """Inexact Newton for g(z) = f(z) - z = 0, with Jacobian-vector products and no Jacobian.

    z ← z + α s,   ‖g - (I - J) s‖₂ <= η ‖g‖₂,   J = ∂f/∂z at z

    A step runs GMRES on (I - J) s = g, for each sample until it meets its own η, and then evaluates f at the new z, where
    a line search may shorten the step. A product J v counts as an evaluation, so a step costs 1 + k, with k at most
    `max_krylov`, for a record of f and k + 1 states of memory; where the Krylov space was too small for η, the next step
    is the restart. Near a solution the residuals fall superlinearly (quadratically for η = 0), where Picard would diverge
    as well. A sample whose Krylov space gives no direction, or for which no evaluations are left, takes a plain step
    s = g.

    By default η follows the progress of each sample (choice 2 of Eisenstat and Walker, with γ = 0.9 and exponent 2):
    η = 0.9 (‖g‖ / ‖g before‖)², not below 0.9 η²_before where that is above 0.1, at most 0.9, and 0.5 at first.

    Evaluations are shared by the batch: a sample that runs out of budget may stop earlier in a harder batch.

    Source: Knoll and Keyes 2004, "Jacobian-free Newton-Krylov methods: a survey of approaches and applications",
    section 2; Eisenstat and Walker 1996, "Choosing the forcing terms in an inexact Newton method", section 2.2;
    Kelley 1995, "Iterative methods for linear and nonlinear equations", chapters 6 and 8.

    >>> import torch
    >>> from equilibria import fixed_point
    >>> z, stats = fixed_point(lambda z: torch.cos(z), torch.zeros(1, 1), solver=NewtonKrylov())
    """

    max_krylov: int = 20
    """Most products J v in a step."""
    forcing: float | None = None
    """η of every step, 0 <= η < 1; None chooses it by progress."""
    differences: bool = False
    """Have J v as (f(z + ε v) - f(z)) / ε, right to about √eps, instead of exactly by autodiff: for an f whose derivatives
    cannot be differentiated again (fused attention on some devices, operations of your own), or to save the record of f."""
    line_search: int = 5
    """Most backtracking evaluations per step (Armijo's condition on ‖g‖², per sample); 0 takes full steps."""

    def __post_init__(self) -> None:
        check_count("NewtonKrylov", "max_krylov", self.max_krylov, 1)
        check_count("NewtonKrylov", "line_search", self.line_search, 0)
        if self.forcing is not None and not 0.0 <= self.forcing < 1.0:
            raise ValueError(f"NewtonKrylov(forcing={self.forcing}): forcing must lie in [0, 1), or be None")

    def init(self, f: Map, z0: Tensor) -> NewtonKrylovState:
        fz = f(z0)
        g = difference(fz, z0)
        forcing = torch.full_like(g[:, 0], 0.5 if self.forcing is None else self.forcing).detach()
        return NewtonKrylovState(z=z0, fz=fz, g=g, forcing=forcing, jacobian=[])

    def step(self, f: Map, state: NewtonKrylovState) -> NewtonKrylovState:
        s = state.g
        if f.remaining > 2 or (state.jacobian and f.remaining > 1):
            jacobian = state.jacobian.pop() if state.jacobian else self._linearize(f, state.z)[1]
            s = self._direction(f, state, jacobian)
            del jacobian
        linearized = _Linearized(f, self._linearize)
        z, fz, g = backtrack(linearized, state, state.z.to(s.dtype) + s, self.line_search)
        forcing = self._next_forcing(state, g)
        return NewtonKrylovState(z=z, fz=fz, g=g, forcing=forcing, jacobian=linearized.jacobian)

    def _linearize(self, f: Map, z: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """f(z), and v -> J v there; each product costs an evaluation, either way."""
        if not self.differences:
            return f.linearize(z)
        fz = f(z)
        reach = torch.finfo(z.dtype).eps ** 0.5 * (1.0 + l2(z)).unsqueeze(1)
        return fz, lambda v: difference(f((z + reach * v).to(z.dtype)), fz) / reach  # ‖v‖ = 1

    def _direction(self, f: Map, state: NewtonKrylovState, jacobian: Callable[[Tensor], Tensor]) -> Tensor:
        """s (B, D) by GMRES from s = 0; each sample as it was when its own η was met."""
        g = state.g
        space = KrylovSpace.of(g, self.max_krylov)
        enough = state.forcing.clamp(min=10 * torch.finfo(g.dtype).eps)
        y = g.new_zeros(len(g), 0)
        residual = torch.ones_like(enough)  # ‖g - (I - J) s‖ / ‖g‖
        open_ = (space.beta > 0).squeeze(1) & space.beta.isfinite().squeeze(1)
        while space.size < self.max_krylov and f.remaining > 1 and bool(open_.any()):
            v = space.basis[:, space.size]
            space = space.extend(v - jacobian(v.to(state.z.dtype)).to(g.dtype))
            size = space.residual.detach()
            better = open_ & (size < residual)
            y = torch.where(better.unsqueeze(1), space.y, torch.nn.functional.pad(y, (0, 1)))
            residual = torch.where(better, size, residual)
            open_ = open_ & (size > enough) & space.grew  # false for NaN
        s = combine(torch.zeros_like(g), -y, space.basis[:, : space.size])
        return torch.where((residual < 1.0).unsqueeze(1), s, g)

    def _next_forcing(self, state: NewtonKrylovState, g: Tensor) -> Tensor:
        if self.forcing is not None:
            return state.forcing
        before, after = l2(state.g.detach()), l2(g.detach())
        eta = 0.9 * torch.where(before > 0, after / before, 0.0).square()
        floor = 0.9 * state.forcing.square()
        return torch.where(floor > 0.1, torch.maximum(eta, floor), eta).nan_to_num(0.9).clamp(max=0.9)


class _Linearized:
    """f, with the Jacobian kept where it was evaluated last."""

    def __init__(self, f: Map, linearize: Callable[[Map, Tensor], tuple[Tensor, Callable[[Tensor], Tensor]]]) -> None:
        self.f = f
        self.linearized = linearize
        self.jacobian: list[Callable[[Tensor], Tensor]] = []

    def __call__(self, z: Tensor, /) -> Tensor:
        self.jacobian = []  # free its record before the next is made
        fz, jacobian = self.linearized(self.f, z)
        self.jacobian = [jacobian]
        return fz

    @property
    def remaining(self) -> int:
        return self.f.remaining

    def linearize(self, z: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        return self.f.linearize(z)
