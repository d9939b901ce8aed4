"""What solves cost, and what each step may spend on them and on keeping them cheap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from equilibria.regularizers import JacobianSchedule
from equilibria.solution import Stats
from equilibria.stopping import Stopping
from equilibria.train.solve_config import SolveConfig


@dataclass(frozen=True, kw_only=True)
class SolveMeans:
    """What a number of solves cost and achieved."""

    evaluations: float
    """Calls of f per solve."""
    residual: float
    """Mean over samples of ‖f(z) - z‖ / ‖f(z)‖ at the z returned."""
    unconverged: float
    """Share of samples that ended above the tolerance."""


FIELDS = ("solves", "evaluations", "samples", "residual", "unconverged")
"""What a `SolveMeter` adds up, in this order."""


class SolveMeter:
    """Adds up the `Stats` of solves, as the plain sums that `FIELDS` names."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.sums = [0.0] * len(FIELDS)

    def __call__(self, stats: Stats) -> None:
        """Add one solve of a batch."""
        relative, unconverged = float(stats.relative.sum()), int((~stats.converged).sum())
        solve = (1, stats.evaluations, stats.relative.numel(), relative, unconverged)
        self.sums = [total + one for total, one in zip(self.sums, solve, strict=True)]

    def means(self) -> SolveMeans | None:
        """Means over all solves since the last reset; None when there was none."""
        return solve_means(self.sums)


def solve_means(sums: Sequence[float]) -> SolveMeans | None:
    """The means that the sums of one `SolveMeter`, or of several added up, amount to; None without a solve.

    >>> solve_means([2, 12, 8, 0.4, 2])
    SolveMeans(evaluations=6.0, residual=0.05, unconverged=0.25)
    """
    solves, evaluations, samples, residual, unconverged = sums
    if solves == 0:
        return None
    return SolveMeans(evaluations=evaluations / solves, residual=residual / samples, unconverged=unconverged / samples)


def step_budget(config: SolveConfig, seed: int, step: int) -> int:
    """Evaluations that a solve of this step may spend: from max_evals - max_evals_delta to max_evals, drawn uniformly.

    It depends on the seed and the step alone, so that a resumed run draws the same. In this way the model learns to be
    right after few steps as well. Source: the code released with Bai, Koltun and Kolter 2021 (`rand_f_thres_delta`).

    >>> sorted({step_budget(SolveConfig(max_evals=12, max_evals_delta=2), 0, step) for step in range(50)})
    [10, 11, 12]
    """
    if config.max_evals_delta == 0:
        return config.max_evals
    draw = torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)
    return config.max_evals - int(torch.randint(config.max_evals_delta + 1, (), generator=draw))


def jacobian_schedule(config: SolveConfig, pretrain_steps: int, seed: int) -> JacobianSchedule:
    """How much the Jacobian loss counts at each step.

    The weight grows at the multiples of `jacobian_every`, but not at those within the `pretrain_steps` of the stack.
    Source: the code released with Bai, Koltun and Kolter 2021 (`jac_incremental`).
    """
    every = config.jacobian_every
    return JacobianSchedule(
        weight=config.jacobian_weight,
        share=config.jacobian_share if config.jacobian_weight else 0.0,
        increment=config.jacobian_increment,
        every=every,
        start=0 if every is None else pretrain_steps // every * every,
        seed=seed,
    )


def eval_stopping(config: SolveConfig) -> Stopping:
    """When a solve outside training is done."""
    return Stopping(
        rtol=config.rtol if config.eval_rtol is None else config.eval_rtol,
        atol=config.atol if config.eval_atol is None else config.eval_atol,
        max_evals=config.max_evals if config.eval_max_evals is None else config.eval_max_evals,
    )


def trace_stopping(config: SolveConfig) -> Stopping:
    """For a look at a whole solve: the residuals are recorded, far below the tolerance of evaluation."""
    usual = eval_stopping(config)
    return Stopping(rtol=usual.rtol / 100, atol=0.0, max_evals=max(30, usual.max_evals), trace=True)
