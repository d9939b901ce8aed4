"""What a solve returns, and every error the library raises."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, NamedTuple

from torch import Tensor


class Status(IntEnum):
    """How the solve of one sample ended."""

    CONVERGED = 0
    """‖f(z) - z‖ <= atol + rtol ‖f(z)‖ at the z returned."""
    EXHAUSTED = 1
    """The budget of evaluations was spent; the z with the smallest residual seen is returned."""
    NONFINITE = 2
    """The residual became inf or NaN; the z before that with the smallest residual is returned."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Stats:
    """How a solve of a batch of B samples went.

    Every residual belongs to the z that was returned, not to an extrapolated or damped step.
    """

    residual: Tensor
    """(B,) norm of f(z) - z, in the norm of `Stopping`."""
    relative: Tensor
    """(B,) the residual divided by the norm of f(z)."""
    evaluations: int
    """Calls of f, those of line searches included."""
    steps: Tensor
    """(B,) int64: solver steps each sample took before it converged, failed or ran out of budget."""
    status: Tensor
    """(B,) int8 values of `Status`."""
    trace: Tensor | None = None
    """(1 + steps, B), with `Stopping(trace=True)`: residuals at the start and after every step. A frozen sample repeats
    its last."""
    backward: list[Stats] = field(default_factory=list)
    """Statistics of the linear solves that derivatives of this solution needed, one for each backward pass through it;
    filled when they run. Inside a torch.func transform with a hidden batch nothing is added."""

    @property
    def converged(self) -> Tensor:
        """(B,) bool: which samples met the tolerance."""
        return self.status == Status.CONVERGED


class Solution(NamedTuple):
    """A fixed point and how it was found; unpacks as `z, stats = solution`."""

    z: Any
    """The fixed point, in the structure of z0."""
    stats: Stats


class EquilibriaError(Exception):
    """Base of the errors that are particular to this library."""


class NonFiniteError(EquilibriaError, ArithmeticError):
    """A solve produced inf or NaN. `solution` holds the best finite iterate and the statistics of every sample."""

    def __init__(self, message: str, solution: Solution | None = None) -> None:
        super().__init__(message)
        self.solution = solution


class ReconstructionError(EquilibriaError, ArithmeticError):
    """A reversible solve could not be walked back to where it started: rounding has outgrown the precision."""


class UndeclaredTensorError(EquilibriaError, RuntimeError):
    """f uses a tensor that requires a gradient and was neither passed in `args` nor owned by the module f."""


class RandomMapError(EquilibriaError, RuntimeError):
    """f draws random numbers, so it has no fixed point."""


class UserError(EquilibriaError, ValueError):
    """Something a user of the program gave cannot be used; the message is one line that says what to do instead."""
