"""The reversible adjoint: the exact gradient of a finite iteration that is undone step by step, in constant memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from math import log
from typing import Any

import torch
from torch import Tensor

from equilibria.adjoints.adjoint import DeclaredFunction, Forward, Function, leaves_of, wanted
from equilibria.iterate import Solved, iterate
from equilibria.solution import ReconstructionError
from equilibria.solvers.reversible import ReversiblePicard, ReversibleState
from equilibria.solvers.solver import State
from equilibria.transforms import differentiating, transformed

GROWTH = 1e12
"""How much the steps of a solve may multiply rounding when they are undone, of the 10¹⁶ that float64 has."""


@dataclass(frozen=True, kw_only=True)
class Reversible:
    """The exact gradient of what `ReversiblePicard` computed, converged or not, with two iterates held.

    The backward pass walks the iteration back: from z_{n+1} and z_n it has z_{n-1} = (z_{n+1} - β f(z_n)) / (1 - β), and
    with one vector-Jacobian product at z_n what `Unrolled` would compute there. It costs one evaluation and one product for
    each step of the forward solve, and holds nothing else. Gradients flow to z0 as well.

    Precision: undoing n steps multiplies rounding by up to (1 - β)⁻ⁿ for an expansive f and by about (1 - β)^(-n/2) for a
    contractive one, so both iterates are float64 even where f is float32. With the default β = 0.5, 30 steps lose 5 to 9
    of 16 digits. A solve is therefore given 12 / log₁₀(1 / (1 - β)) steps at most, 39 by default, in evaluation as in
    training, whatever the budget. The way back ends at z0, which is known: if it misses it by more than `tolerance`,
    ReconstructionError is raised instead of returning a wrong gradient.

    First derivatives in reverse mode only; not inside torch.func transforms. The batch stays whole.

    Source: McCallum and Foster 2025, "Reversible deep equilibrium models", section 3.

    >>> import torch
    >>> from equilibria import ReversiblePicard, fixed_point
    >>> a = torch.ones(1, 1, requires_grad=True)
    >>> z, stats = fixed_point(
    ...     lambda z, a: 0.5 * z + a, torch.zeros(1, 1), a, solver=ReversiblePicard(), adjoint=Reversible()
    ... )
    >>> round(float(torch.autograd.grad(z.sum(), a)[0]), 2)
    2.0
    """

    tolerance: float = 1e-3
    """How far the walk back may end from z0, relative to the largest entry of z0 and z*, before the gradient is refused."""

    def __post_init__(self) -> None:
        if not self.tolerance > 0:
            raise ValueError(f"Reversible(tolerance={self.tolerance}): tolerance must be > 0")

    def solve(self, f: DeclaredFunction, z0: Tensor, args: tuple[Tensor, ...], forward: Forward) -> Solved:
        if not isinstance(forward.solver, ReversiblePicard):
            raise ValueError(
                "Reversible() undoes the steps of ReversiblePicard alone; give solver=ReversiblePicard() instead of "
                f"{forward.solver!r}, or use Implicit()"
            )
        if transformed():
            raise NotImplementedError("Reversible() does not work inside torch.func transforms; use Implicit()")
        most = 1 + int(log(GROWTH) / -log(1.0 - forward.solver.damping))
        forward.stopping = replace(forward.stopping, max_evals=min(forward.stopping.max_evals, most))
        fz0 = forward.probe(f, z0, args, check_grad=differentiating())
        return Solved(*_Reversible.apply(self, forward.solver.damping, f, forward, fz0, z0, *args))  # type: ignore[misc]


class _Best:
    """Keeps the two exact iterates of each sample at the step where it was best, and that step."""

    def __init__(self) -> None:
        self.step = 0

    def __call__(self, state: State, better: Tensor, running: Tensor) -> None:
        assert isinstance(state, ReversibleState)
        if self.step == 0:
            self.before, self.exact, self.steps = state.before, state.exact, torch.zeros_like(better, dtype=torch.int64)
        else:
            rows = better.unsqueeze(1)
            self.before = torch.where(rows, state.before, self.before)
            self.exact = torch.where(rows, state.exact, self.exact)
            self.steps = torch.where(better, self.step, self.steps)
        self.step += 1


class _Reversible(torch.autograd.Function):
    """z0, *args -> the fields of Solved."""

    @staticmethod
    def forward(
        ctx: Any, adjoint: Reversible, damping: float, f: Function, forward: Forward, fz0: Tensor, z0: Tensor, *args: Tensor
    ) -> Any:
        best = _Best()
        forward.search = partial(iterate, watch=best)
        solved = forward(f, z0, fz0, args)
        ctx.adjoint, ctx.f, ctx.damping = adjoint, f, damping
        ctx.mark_non_differentiable(*solved[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(best.before, best.exact, best.steps, z0, *args)
        return tuple(solved)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        if torch.is_grad_enabled():
            raise NotImplementedError("Reversible() has first derivatives only; use Implicit() for second ones")
        g = gradients[0]
        before, exact, steps, z0, *args = ctx.saved_tensors
        if g is None:
            return (None,) * (6 + len(args))
        wants = wanted(ctx.needs_input_grad[6:], args)
        walk = _WalkBack(partial(_pull, ctx.f, args, wants), ctx.damping, z0.dtype)
        start, of_z0, of_args = walk(before, exact, steps, g.to(torch.float64))
        _check(start, z0, exact, ctx.adjoint.tolerance, ctx.damping, int(steps.max()))
        found = iter(of_args if of_args else [None] * sum(wants))
        return (None, None, None, None, None, of_z0.to(z0.dtype), *(next(found) if want else None for want in wants))


class _WalkBack:
    """The steps of a solve, undone."""

    def __init__(self, pull: Callable[[Tensor, Tensor], Any], damping: float, dtype: torch.dtype) -> None:
        self.pull, self.damping, self.dtype = pull, damping, dtype

    def __call__(
        self, before: Tensor, exact: Tensor, steps: Tensor, g: Tensor
    ) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        """z0 as it was found again, the gradient of z0 and those of the args, from the gradient g of `exact`."""
        g_before = torch.zeros_like(g)
        totals: list[Tensor | None] = []
        for step in range(int(steps.max()), 0, -1):
            undone = (steps >= step).unsqueeze(1)  # the others have not begun to walk
            cotangent = torch.where(undone, self.damping * g, 0.0).to(self.dtype)
            f_before, of_z, of_args = self.pull(before.to(self.dtype), cotangent)
            earlier = (exact - self.damping * f_before.to(torch.float64)) / (1.0 - self.damping)
            g_earlier = (1.0 - self.damping) * g
            g = torch.where(undone, g_before + of_z.to(torch.float64), g)
            g_before = torch.where(undone, g_earlier, g_before)
            before, exact = torch.where(undone, earlier, before), torch.where(undone, before, exact)
            totals = of_args if not totals else [_sum(a, b) for a, b in zip(totals, of_args, strict=True)]
        return exact, g + g_before, totals


def _pull(
    f: Function, args: list[Tensor], wants: list[bool], z: Tensor, cotangent: Tensor
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """f(z), and the cotangent pulled back to z and to the args that want it."""
    with torch.enable_grad():
        z, args, inputs = leaves_of(z, args, wants)
        fz = f(z, *args)
    if not fz.requires_grad:
        return fz, torch.zeros_like(z), [None] * (len(inputs) - 1)
    found: list[Tensor | None] = list(torch.autograd.grad(fz, inputs, cotangent, allow_unused=True))
    of_z = found[0]
    return fz.detach(), torch.zeros_like(z) if of_z is None else of_z, found[1:]


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return a if b is None else b if a is None else a + b


def _check(start: Tensor, z0: Tensor, end: Tensor, tolerance: float, damping: float, steps: int) -> None:
    scale = torch.maximum(z0.abs().amax(dim=1), end.abs().amax(dim=1))  # (B,)
    missed = (start - z0).abs().amax(dim=1)
    if not bool((missed <= tolerance * scale).all()):
        raise ReconstructionError(
            f"the backward pass undid {steps} steps and missed z0 by {float(missed.max()):.1e}, so its gradient would be "
            f"wrong: rounding grows by up to {1 / (1 - damping):.3g} at each step undone. Use a smaller damping than "
            f"{damping}, a smaller Stopping(max_evals) or larger Stopping(rtol) for fewer steps, or Implicit()"
        )
