"""When a solve is done: how the residual is measured, how small it must be, how much may be spent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Norm = Callable[[Tensor], Tensor]


def work_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision of norms, Gram matrices and small systems: float32 at least, also for a bfloat16 or float16 state."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def l2(r: Tensor) -> Tensor:
    """‖r‖₂ of every row: (B, D) -> (B,)."""
    return torch.linalg.vector_norm(r, dim=1, dtype=work_dtype(r.dtype))


def rms(r: Tensor) -> Tensor:
    """‖r‖₂ / √D of every row: (B, D) -> (B,). Does not grow with the size of the state."""
    return l2(r) * r.shape[1] ** -0.5


def linf(r: Tensor) -> Tensor:
    """max |r| of every row: (B, D) -> (B,)."""
    return torch.linalg.vector_norm(r, ord=float("inf"), dim=1, dtype=work_dtype(r.dtype))


@dataclass(frozen=True, kw_only=True)
class Stopping:
    """A sample is done when ‖f(z) - z‖ <= atol + rtol ‖f(z)‖, or when the budget is spent.

    >>> Stopping(rtol=1e-6, max_evals=100).max_evals
    100
    """

    rtol: float = 1e-3
    """Relative tolerance."""
    atol: float = 1e-12
    """Absolute tolerance, in the units of `norm`; it decides only where the fixed point is zero."""
    max_evals: int = 100
    """Budget: calls of f, those of line searches included. The call f(z0) counts."""
    norm: Norm = rms
    """(B, D) -> (B,): `rms` (default), `l2`, `linf`, or your own."""
    check_every: int = 1
    """Steps between two looks at whether every sample is done (each look waits for an accelerator). The z returned does
    not depend on it, for a converged sample is frozen at once; only evaluations may be wasted."""
    trace: bool = False
    """Record the residual of every sample at every step in `Stats.trace`."""

    def __post_init__(self) -> None:
        for name in ("rtol", "atol"):
            value = getattr(self, name)
            if not 0.0 <= value < float("inf"):
                raise ValueError(f"Stopping({name}={value}): {name} must be a finite number >= 0")
        for name in ("max_evals", "check_every"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"Stopping({name}={value!r}): {name} must be an integer >= 1")
        if not callable(self.norm):
            raise TypeError(
                f"Stopping(norm={self.norm!r}): norm must be a function (B, D) -> (B,), such as "
                "equilibria.stopping.rms, l2 or linf"
            )

    def tolerance(self, scale: Tensor) -> Tensor:
        """(B,) the residual allowed where ‖f(z)‖ is `scale`."""
        return self.atol + self.rtol * scale
