"""Options of the solves, forward and backward.

A sample has converged when ‖f(z) - z‖ <= atol + rtol ‖f(z)‖, with norms divided by the root of the size of the state, so
that an atol is an error per entry. What the released scripts call the options stands in docs/migrating/deq.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from equilibria.train.checks import check, check_not_negative, check_positive

MethodName = Literal["anderson", "broyden", "newton-krylov", "picard", "reversible"]
BackwardName = Literal["implicit", "shine", "neumann", "phantom", "unrolled", "checkpointed", "reversible"]
LinearName = Literal["gmres", "anderson", "broyden", "picard"]


@dataclass(frozen=True, kw_only=True)
class SolveConfig:
    """How the fixed point is found, and how gradients pass through it."""

    method: MethodName = "anderson"
    """Solver of the forward pass."""
    history: int = 5
    """With --method or --backward-method anderson or broyden: past steps that the solver keeps."""
    damping: float = 1.0
    """With --method anderson or picard: length of a step; 1 is the full step. With reversible: its β, below 1."""
    rtol: float = 1e-2
    """A sample has converged when ‖f(z) - z‖ <= atol + rtol ‖f(z)‖; 0 for an absolute test."""
    atol: float = 1e-6
    """The absolute part of that test; 0 for a relative one."""
    max_evals: int = 16
    """Evaluations of f that one solve may spend in training."""
    max_evals_delta: int = 0
    """Each step draws its budget in training from --max-evals less this many up to --max-evals, all equally likely."""
    eval_rtol: float | None = None
    """The relative tolerance outside training; None: as in training."""
    eval_atol: float | None = None
    """The absolute tolerance outside training; None: as in training."""
    eval_max_evals: int | None = None
    """The budget of evaluations outside training; None: as in training."""
    backward: BackwardName = "implicit"
    """implicit: solve the linear system of the implicit function theorem; shine: from what Anderson or Broyden learnt;
    neumann: the first terms of its series; phantom: differentiate a few last steps; unrolled: the whole solve, or
    checkpointed, in less memory; reversible: walk the reversible method back."""
    backward_method: LinearName = "gmres"
    """With --backward implicit: solver of the linear system."""
    backward_rtol: float = 1e-2
    """With --backward implicit or shine: relative tolerance of the backward solve."""
    backward_atol: float = 1e-12
    """With --backward implicit: absolute tolerance of the backward solve."""
    backward_max_evals: int = 16
    """With --backward implicit or shine: vector-Jacobian products that one backward solve may spend."""
    phantom_steps: int = 1
    """With --backward phantom: steps that it differentiates. With neumann: terms of the series."""
    jacobian_weight: float = 0.0
    """Weight of the Jacobian loss, which keeps solves short as training goes on; 0 for none."""
    jacobian_share: float = 0.4
    """With --jacobian-weight: share of the steps, drawn at random, that the Jacobian loss is added to."""
    jacobian_increment: float = 0.1
    """With --jacobian-every: added to the weight at its multiples, once the stack's warm-up is over."""
    jacobian_every: int | None = None
    """With --jacobian-weight: steps between two increments of the weight; None: it stays."""

    def __post_init__(self) -> None:
        check_positive(self, "history", "max_evals", "eval_max_evals", "backward_max_evals", "phantom_steps")
        check_positive(self, "jacobian_every")
        check_not_negative(self, "rtol", "atol", "eval_rtol", "eval_atol", "backward_rtol", "backward_atol")
        check_not_negative(self, "jacobian_weight", "jacobian_increment")
        for part, rtol, atol in (
            ("", self.rtol, self.atol),
            ("eval_", self.rtol if self.eval_rtol is None else self.eval_rtol,
             self.atol if self.eval_atol is None else self.eval_atol),
            ("backward_", self.backward_rtol, self.backward_atol),
        ):  # fmt: skip
            check(rtol > 0 or atol > 0, f"{part}rtol", rtol, f"it and --{part.replace('_', '-')}atol cannot both be 0")
        check(0 <= self.max_evals_delta < self.max_evals, "max_evals_delta", self.max_evals_delta,
              f"give 0 or more, and less than --max-evals {self.max_evals}")  # fmt: skip
        check(0 <= self.jacobian_share <= 1, "jacobian_share", self.jacobian_share, "give a share between 0 and 1")
        check(0 < self.damping <= 2, "damping", self.damping, "give a number above 0 and at most 2")
        self._check_pairs()

    def _check_pairs(self) -> None:
        if self.method == "reversible":
            check(self.damping < 1, "damping", self.damping, "the reversible method needs one below 1, such as 0.5")
        undone = self.backward != "reversible" or self.method == "reversible"
        check(undone, "backward", self.backward, f"give --method reversible as well, for {self.method} cannot be undone")
        learns = self.backward != "shine" or self.method in ("anderson", "broyden")
        check(learns, "backward", self.backward, f"give --method anderson or broyden, for {self.method} learns nothing")
        linear = self.backward_method == "gmres" or self.backward == "implicit"
        check(linear, "backward_method", self.backward_method, f"{self.backward} solves no system; use --backward implicit")
