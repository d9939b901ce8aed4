"""What to do where training goes wrong in the known ways.

Each rule looks at the rows of metrics so far and at the configuration, and gives an `Advice` or None. It changes nothing
and keeps nothing, so that the advice of a run can be had again from its files.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

from equilibria.train.config import RunConfig, TransformerModel
from equilibria.train.history import History, mean
from equilibria.train.solves import eval_stopping

BF16_FLOOR = 2e-3
"""Relative residual that a solve with a state of bfloat16, of 8 bits, hardly gets below."""


@dataclass(frozen=True, kw_only=True)
class Advice:
    """Something that goes wrong."""

    kind: str
    """Name of the rule."""
    step: int
    """When it was seen."""
    severity: float
    """How bad it is, in a unit of its own."""
    seen: str
    """What the numbers are."""
    means: str
    """What follows from that."""
    remedy: str
    """Options to try, with values."""

    def __str__(self) -> str:
        return f"{self.seen}. {self.means}. Try {self.remedy}."


# -- the solves ---------------------------------------------------------------------------------------------------


def forward_budget(history: History) -> Advice | None:
    """Most solves of training spend their budget and end above the tolerance."""
    rows, solver = history.last(5, "forward/unconverged"), history.config.solver
    if len(rows) < 5:
        return None
    share, used, residual = (mean(rows, f"forward/{key}") for key in ("unconverged", "evaluations", "residual"))
    budget = solver.max_evals - solver.max_evals_delta / 2
    # An absolute tolerance, as the released scripts have it, is meant to be out of reach: there the residual counts.
    harmless = residual < 0.05 if solver.rtol == 0 else history.config.precision == "bf16" and residual < 3 * BF16_FLOOR
    if share <= 0.5 or used < 0.9 * budget or residual < 1.5 * solver.rtol or harmless:
        return None
    more = _enough(solver.max_evals, residual, solver.rtol)
    return Advice(
        kind="forward budget",
        step=history.step,
        severity=residual,
        seen=f"{_percent(share)} of the samples end above the tolerance with the budget spent ({used:.1f} of "
        f"{solver.max_evals} evaluations), at a relative residual of {residual:.1g}",
        means="Loss and gradient are those of an unfinished solve",
        remedy=f"--max-evals {more}, or {_tame(history.config)}, which makes solves easier",
    )


def backward_budget(history: History) -> Advice | None:
    """Most backward solves end above their tolerance."""
    rows, solver = history.last(5, "backward/unconverged"), history.config.solver
    if len(rows) < 5:
        return None
    share, used, residual = (mean(rows, f"backward/{key}") for key in ("unconverged", "evaluations", "residual"))
    if share <= 0.5 or residual < max(5 * solver.backward_rtol, 0.05):
        return None
    more = _enough(solver.backward_max_evals, residual, solver.backward_rtol)
    return Advice(
        kind="backward budget",
        step=history.step,
        severity=residual,
        seen=f"{_percent(share)} of the backward solves do not converge ({used:.1f} of {solver.backward_max_evals} "
        f"products, relative residual {residual:.1g})",
        means=f"The gradient is wrong by about {_percent(min(residual, 1.0))} of its size",
        remedy=f"--backward-max-evals {more}, or {_tame(history.config)}, which makes both solves easier",
    )


def harder_solves(history: History) -> Advice | None:
    """Residuals or evaluations grew over training."""
    rows, solver = history.rows("forward/residual"), history.config.solver
    part = len(rows) // 8
    if part < 2:
        return None
    early, late = rows[part : 2 * part], rows[-part:]
    before, after = mean(early, "forward/residual"), mean(late, "forward/residual")
    cheap, dear = mean(early, "forward/evaluations"), mean(late, "forward/evaluations")
    residual_grew = after > 2 * before and after > max(2 * solver.rtol, 0.02)
    near_budget = dear > 1.5 * cheap and dear > 0.8 * (solver.max_evals - solver.max_evals_delta / 2)
    if not residual_grew and not near_budget:
        return None
    return Advice(
        kind="harder solves",
        step=history.step,
        severity=max(after / before, dear / cheap),
        seen=f"since step {early[-1]['step']:,} solves went from {cheap:.1f} evaluations and a residual of {before:.1g} "
        f"to {dear:.1f} and {after:.1g}",
        means="The map loses its contraction as the weights grow, and in time the solves will fail",
        remedy=_tame(history.config),
    )


def validation_budget(history: History) -> Advice | None:
    """The solves of validation spend their budget far above their tolerance."""
    rows, stopping = history.valid[-2:], eval_stopping(history.config.solver)
    rows = [row for row in rows if "valid/residual" in row]
    if len(rows) < 2:
        return None
    used, residual = mean(rows, "valid/evaluations"), mean(rows, "valid/residual")
    if used < 0.95 * stopping.max_evals or residual < max(3 * stopping.rtol, 0.02 if stopping.rtol else 0.05):
        return None
    return Advice(
        kind="validation budget",
        step=history.step,
        severity=residual,
        seen=f"solves of validation spend {used:.1f} of {stopping.max_evals} evaluations and end at a relative "
        f"residual of {residual:.1g}",
        means="The validation loss is that of unfinished solves, and may flatter or wrong the weights",
        remedy=f"--eval-max-evals {_enough(stopping.max_evals, residual, stopping.rtol)}",
    )


def bf16_floor(history: History) -> Advice | None:
    """A tolerance is asked for that bfloat16 cannot reach."""
    config, solver = history.config, history.config.solver
    if config.precision != "bf16" or config.model.depth is not None:
        return None
    asked = {
        "rtol": solver.rtol,
        "backward_rtol": solver.backward_rtol if solver.backward in ("implicit", "shine") else 1.0,
    }
    low = {name: value for name, value in asked.items() if value < BF16_FLOOR}
    if not low:
        return None
    options = [f"--{name.replace('_', '-')}" for name in low]
    return Advice(
        kind="bf16 floor",
        step=0,
        severity=BF16_FLOOR / max(min(low.values()), 1e-9),
        seen=f"{' and '.join(f'{option} {value:g}' for option, value in zip(options, low.values(), strict=True))} with "
        "--precision bf16",
        means=f"In bfloat16 relative residuals hardly fall below {BF16_FLOOR:g}, so each solve would spend its budget",
        remedy=" ".join(f"{option} {BF16_FLOOR:g}" for option in options) + ", or --precision no",
    )


# -- the steps ----------------------------------------------------------------------------------------------------


def always_clipped(history: History) -> Advice | None:
    """Every gradient is far longer than the clip."""
    rows, optim = history.last(10, "train/clipped"), history.config.optim
    if len(rows) < 10 or rows[0]["step"] <= optim.warmup_steps:
        return None
    norm, share = median(row["train/gradient_norm"] for row in rows), mean(rows, "train/clipped")
    if share < 0.98 or norm < 5 * optim.clip:
        return None
    return Advice(
        kind="always clipped",
        step=history.step,
        severity=norm / optim.clip,
        seen=f"{_percent(share)} of the gradients are clipped; their norm is about {norm:.2g}, --clip is {optim.clip:g}",
        means="All steps count alike, the wild as much as the good",
        remedy=f"--clip {_round(2 * norm)}",
    )


def exploding_gradient(history: History) -> Advice | None:
    """The gradient is suddenly many times its usual length."""
    rows, optim = history.last(21, "train/gradient_norm"), history.config.optim
    if len(rows) < 11:
        return None
    usual, norm = median(row["train/gradient_norm"] for row in rows[:-1]), rows[-1]["train/gradient_norm"]
    if norm < 10 * usual or norm <= optim.clip:
        return None
    tighter = f" --clip {_round(2 * usual)}" if optim.clip > 2 * usual else ""
    return Advice(
        kind="exploding gradient",
        step=history.step,
        severity=norm / usual,
        seen=f"the gradient has a norm of {norm:.2g}, {norm / usual:.0f} times that of the steps before",
        means="I - J is close to singular, or the step size too large",
        remedy=f"--lr {_round(optim.lr / 2)}{tighter}, or {_tame(history.config)}",
    )


def loss_spike(history: History) -> Advice | None:
    """The training loss jumps far out of its usual scatter, or above where it began."""
    rows = history.last(21, "train/loss")
    if len(rows) < 3:
        return None
    losses, now = [row["train/loss"] for row in rows[:-1]], rows[-1]["train/loss"]
    usual, first = median(losses), history.rows("train/loss")[0]["train/loss"]
    scatter = 1.48 * median(abs(loss - usual) for loss in losses)
    if now < first + 1.0 and (len(rows) < 11 or now - usual < 8 * scatter + 0.3):
        return None
    usual = min(usual, first)
    optim = history.config.optim
    norms = [row["train/gradient_norm"] for row in rows[:-1] if "train/gradient_norm" in row]
    clip = f" --clip {_round(median(norms))}" if norms and optim.clip > median(norms) else ""
    return Advice(
        kind="loss spike",
        step=history.step,
        severity=now - usual,
        seen=f"the training loss rose from about {usual:.3g} to {now:.3g} nats per token",
        means="A step was too long; weights that got lost that way seldom come back",
        remedy=f"--lr {_round(optim.lr / 2)}{clip} --warmup-steps {max(2 * optim.warmup_steps, optim.steps // 20)}",
    )


def overfitting(history: History) -> Advice | None:
    """The validation loss gets worse while the training loss gets better."""
    rows = history.valid
    if len(rows) < 4:
        return None
    best = min(range(len(rows)), key=lambda index: rows[index]["valid/loss"])
    lowest, now = rows[best]["valid/loss"], rows[-1]["valid/loss"]
    if best > len(rows) - 4 or now < lowest + max(0.01, 0.005 * abs(lowest)):
        return None
    then, since = history.loss_until(rows[best]["step"]), history.last(5, "train/loss")
    if then is None or mean(since, "train/loss") > then - 0.01:
        return None
    name, dropout = dropout_option(history.config)
    return Advice(
        kind="overfitting",
        step=history.step,
        severity=now - lowest,
        seen=f"the validation loss was best at step {rows[best]['step']:,} ({lowest:.3f}) and is {now:.3f} now, while the "
        f"training loss fell from {then:.3f} to {mean(since, 'train/loss'):.3f}",
        means="The model learns the training text by heart; best/ keeps the weights of the best validation",
        remedy=f"{name} {min(round(dropout + 0.1, 2), 0.7):g}, or --steps {rows[best]['step']}",
    )


def validation_time(history: History) -> Advice | None:
    """More time goes into validations and checkpoints than into steps."""
    outside, inside = history.seconds_outside, history.seconds_inside
    every = history.config.eval_every
    if len(history.valid) < 2 or outside + inside < 60 or outside < inside:
        return None
    fewer = f"--eval-every {math.ceil(4 * every * outside / inside / 10) * 10}, or " if every else ""
    return Advice(
        kind="validation time",
        step=history.step,
        severity=outside / inside,
        seen=f"{_percent(outside / (outside + inside))} of the time went into validations and checkpoints",
        means="The run takes more than twice the time of its steps",
        remedy=f"{fewer}--max-eval-steps, which reads but the beginning of the split",
    )


Rule = Callable[[History], Advice | None]
RULES: tuple[Rule, ...] = (
    forward_budget, backward_budget, harder_solves, validation_budget, always_clipped, exploding_gradient, loss_spike,
    overfitting, validation_time,
)  # fmt: skip


def _enough(budget: int, residual: float, rtol: float) -> int:
    """Evaluations that would reach the tolerance, if residuals fall from 1 at a constant rate; at most four times more."""
    if not 0 < residual < 0.7 or rtol <= 0:
        return 2 * budget
    return max(budget + 1, min(4 * budget, math.ceil(budget * math.log(rtol) / math.log(residual))))


def _tame(config: RunConfig) -> str:
    weight = config.solver.jacobian_weight
    return f"--jacobian-weight {_round(2 * weight) if weight else '0.5'}"


def dropout_option(config: RunConfig) -> tuple[str, float]:
    """The option for dropout that a model of this family has, and its value."""
    if isinstance(config.model, TransformerModel):
        return "--dropout", config.model.dropout
    return "--output-dropout", config.model.output_dropout


def _round(value: float) -> str:
    """Two digits, as one would type them."""
    return f"{float(f'{value:.2g}'):g}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
