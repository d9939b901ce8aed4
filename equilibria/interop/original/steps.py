"""The steps of the released solvers where they are not the library's own: proper solvers, for comparison.

They are no solvers to train with: one step length for the whole batch makes a sample's answer depend on its neighbours, and
an absolute ridge stalls.

Source: the code released with Bai, Kolter and Koltun, "Deep Equilibrium Models", 2019, and with Bai, Koltun and Kolter,
"Stabilizing Equilibrium Models by Jacobian Regularization", 2021.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from equilibria.solvers import Broyden
from equilibria.solvers.broyden import BroydenState
from equilibria.solvers.solver import Map, State, check_count, check_damping, difference


@dataclass(frozen=True, kw_only=True)
class ArmijoState(BroydenState):
    trials: int
    """Cubic interpolations so far; the released code counts them, and not the full step and the parabola."""


@dataclass(frozen=True, kw_only=True)
class ArmijoBroyden(Broyden):
    """`Broyden` with the released line search: one α for the whole batch, by Armijo's condition on φ(α) = ‖g(z + α Δz)‖².

    If α = 1 fails it, the minima of cubics are tried, from α = 1 and the minimum of a parabola on, until one meets
    φ(α) <= (1 - 10⁻⁴ α) φ(0). If α falls to 10⁻² before, the full step is taken. The minimum of the parabola is
    evaluated and not taken itself, as in the released code.

    Source: Nocedal and Wright 2006, "Numerical optimization", section 3.5, for the interpolation.

    >>> from equilibria import fixed_point
    >>> z, stats = fixed_point(lambda z: torch.cos(z), torch.zeros(1, 1), solver=ArmijoBroyden())
    """

    @property
    def traceable(self) -> bool:
        return False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.line_search:
            raise ValueError(
                f"ArmijoBroyden(line_search={self.line_search}): it has its own; use Broyden for that of samples"
            )

    def init(self, f: Map, z0: Tensor) -> ArmijoState:
        return ArmijoState(**vars(super().init(f, z0)), trials=0)

    def step(self, f: Map, state: BroydenState) -> ArmijoState:
        assert isinstance(state, ArmijoState)
        full = super().step(f, state)
        points = {1.0: (full.z, full.fz, full.g)}

        def phi(alpha: float) -> float:
            if alpha not in points:
                z = state.z + alpha * (full.z - state.z)
                fz = f(z)
                points[alpha] = z, fz, difference(fz, z)
            return _square(points[alpha][2])

        alpha, trials = armijo(phi, _square(state.g), lambda: f.remaining > 0)
        if alpha != 1.0:
            full = self._remember(state, *points[alpha])  # in the slot of the full step
        return ArmijoState(**vars(full), trials=state.trials + trials)


def armijo(phi: Callable[[float], float], start: float, may_go_on: Callable[[], bool]) -> tuple[float, int]:
    """(α, cubic trials) with φ(α) <= (1 - 10⁻⁴ α) φ(0), where φ(0) = start and φ'(0) is taken as -φ(0).

    (1, 0) where none is found before α falls to 10⁻².
    """

    def enough(alpha: float, value: float) -> bool:
        return value <= start - 1e-4 * alpha * start

    a0, phi0 = 1.0, phi(1.0)
    if enough(a0, phi0) or not may_go_on():
        return a0, 0
    a1 = start / (2.0 * phi0)  # the parabola through φ(0), φ'(0) and φ(1)
    phi1 = phi(a1)
    trials = 0
    while a1 > 1e-2 and may_go_on():
        rest0, rest1 = phi0 - start + start * a0, phi1 - start + start * a1
        scale = a0**2 * a1**2 * (a1 - a0)
        if not scale or not math.isfinite(rest0 + rest1):
            break
        cubic = (a0**2 * rest1 - a1**2 * rest0) / scale
        square = (-(a0**3) * rest1 + a1**3 * rest0) / scale
        if not cubic:
            break
        a2 = (-square + math.sqrt(abs(square * square + 3.0 * cubic * start))) / (3.0 * cubic)
        phi2 = phi(a2)
        trials += 1
        if enough(a2, phi2):
            return a2, trials
        if a1 - a2 > a1 / 2.0 or 1.0 - a2 / a1 < 0.96:
            a2 = a1 / 2.0
        a0, a1, phi0, phi1 = a1, a2, phi1, phi2
    return 1.0, 0


@dataclass(frozen=True, kw_only=True)
class RidgeAndersonState(State):
    zs: Tensor
    """(B, m, D) the last iterates; a ring buffer."""
    fzs: Tensor
    """(B, m, D) f of them."""
    age: int
    """Iterates stored so far."""


@dataclass(frozen=True, kw_only=True)
class RidgeAnderson:
    """Anderson acceleration with an absolute ridge, in constrained form.

    z ← damping Σ αᵢ f(zᵢ) + (1 - damping) Σ αᵢ zᵢ,   α = argmin ‖Σ αᵢ gᵢ‖² + ridge ‖α‖²  with  Σ αᵢ = 1,

    over the last `history` iterates; the first step is a plain one. The ridge outweighs ‖g‖² once the residual is below
    its root: with 10⁻⁴ the method stalls near 10⁻⁵ where `Anderson`, whose ridge is relative, goes on.

    Source: Walker and Ni 2011, "Anderson acceleration for fixed-point iterations"; the ridge is that of the code of 2021.

    >>> from equilibria import fixed_point
    >>> z, stats = fixed_point(lambda z: torch.cos(z), torch.zeros(1, 1), solver=RidgeAnderson())
    """

    history: int = 6
    ridge: float = 1e-4
    damping: float = 1.0

    def __post_init__(self) -> None:
        check_count("RidgeAnderson", "history", self.history, 1)
        check_damping("RidgeAnderson", self.damping)
        if not self.ridge >= 0:
            raise ValueError(f"RidgeAnderson(ridge={self.ridge}): ridge must be >= 0")

    def init(self, f: Map, z0: Tensor) -> RidgeAndersonState:
        fz = f(z0)
        return RidgeAndersonState(z=z0, fz=fz, g=difference(fz, z0), zs=z0[:, None], fzs=fz[:, None], age=1)

    def step(self, f: Map, state: RidgeAndersonState) -> RidgeAndersonState:
        z = state.fz if state.age == 1 else self._combination(state)
        fz = f(z)
        slot = state.age % self.history
        zs, fzs = _put(state.zs, slot, z), _put(state.fzs, slot, fz)
        return RidgeAndersonState(z=z, fz=fz, g=difference(fz, z), zs=zs, fzs=fzs, age=state.age + 1)

    def _combination(self, state: RidgeAndersonState) -> Tensor:
        zs, fzs = state.zs.to(state.g.dtype), state.fzs.to(state.g.dtype)
        gs = fzs - zs
        batch, used, _ = gs.shape
        bordered = gs.new_zeros(batch, used + 1, used + 1)  # the multiplier of Σ αᵢ = 1 comes first
        bordered[:, 0, 1:] = bordered[:, 1:, 0] = 1.0
        bordered[:, 1:, 1:] = torch.bmm(gs, gs.mT) + self.ridge * torch.eye(used, dtype=gs.dtype, device=gs.device)
        rhs = torch.zeros_like(bordered[:, 0])
        rhs[:, 0] = 1.0
        alpha = torch.linalg.solve(bordered, rhs)[:, None, 1:]  # (B, 1, used)
        mixed = self.damping * torch.bmm(alpha, fzs) + (1.0 - self.damping) * torch.bmm(alpha, zs)
        return mixed.squeeze(1).to(state.z.dtype)


def _put(ring: Tensor, slot: int, row: Tensor) -> Tensor:
    """A copy of the ring (B, m, D) with the row (B, D) in a slot, or behind the last."""
    return torch.cat((ring[:, :slot], row[:, None], ring[:, slot + 1 :]), dim=1)


def _square(g: Tensor) -> float:
    norm = float(torch.linalg.vector_norm(g))
    return norm * norm if math.isfinite(norm) else math.inf
