"""Backtracking: shorten a step until it lowers the residual enough."""

from __future__ import annotations

import torch
from torch import Tensor

from equilibria.solvers.solver import Map, State, difference
from equilibria.stopping import l2


def backtrack(f: Map, state: State, target: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """(z, f(z), g) at z = state.z + α (target - state.z), with α of every sample by Armijo's condition.

    α starts at 1 and shrinks until ‖g(z)‖² <= (1 - 2·10⁻⁴ α) ‖g(state.z)‖², where -2 ‖g(state.z)‖² is the slope along a
    Newton step (and, in its own model, along a quasi-Newton step). The next α is the minimum of the parabola through both
    values and that slope, kept within [0.1, 0.5] of the last. Samples do not influence each other's α.

    Args:
        f: the map. The full step takes one evaluation, the search at most `most` more and never more than f has left.
        state: where the step starts.
        target: (B, D) where the full step leads, in the dtype of `state.g`.
        most: shorter steps to try at most. The last one tried is taken, good or not; 0 takes the full step.

    Source: Armijo 1966; interpolation by Dennis and Schnabel 1983, "Numerical methods for unconstrained optimization and
    nonlinear equations", section 6.3.2.

    >>> from equilibria.solvers.solver import State
    >>> class Map:  # g(z) = -arctan(z): Newton's step from z = 2 leads to -3.5
    ...     remaining = 9
    ...     def __call__(self, z): return z - torch.atan(z)
    >>> f, z = Map(), torch.full((1, 1), 2.0)
    >>> newton = z - torch.atan(z) * (1 + z**2)
    >>> shortened, _, _ = backtrack(f, State(z=z, fz=f(z), g=f(z) - z), newton, most=3)
    >>> round(float(shortened), 2)
    -0.34
    """
    start, before = state.z.to(target.dtype), l2(state.g).square()
    alpha = torch.ones_like(before)
    # No step helps a sample that has failed, or one whose residual is rounding: they must not spend the batch's budget.
    rounding = 10 * torch.finfo(state.z.dtype).eps * l2(state.fz)
    open_ = before.isfinite() & (before > rounding.square())
    z = target.to(state.z.dtype)
    fz = f(z)
    g = difference(fz, z)
    for _ in range(most):
        after = l2(g).square()
        short = open_ & ~(after <= (1.0 - 2e-4 * alpha) * before)  # true for NaN too
        if f.remaining <= 0 or not bool(short.any()):
            break
        factor = (alpha * before / (after - before + 2 * alpha * before)).nan_to_num(0.1).clamp(0.1, 0.5)
        alpha = torch.where(short, alpha * factor, alpha)
        tried = (start + alpha.unsqueeze(1) * (target - start)).to(state.z.dtype)
        z = torch.where(short.unsqueeze(1), tried, z)
        fz = f(z)
        g = difference(fz, z)
    return z, fz, g
