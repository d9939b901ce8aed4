"""Options of the optimizer, of its learning rate, and of how much of the text one step sees.

What the released scripts call them stands in docs/migrating/deq.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from equilibria.train.checks import check, check_not_negative, check_positive

OptimizerName = Literal["adamw", "adam", "sgd", "adagrad", "rmsprop", "radam"]
ScheduleName = Literal["cosine", "inverse-sqrt", "constant", "dev-performance", "step-decay"]


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer, its schedule, and how much of the text one step sees."""

    optimizer: OptimizerName = "adamw"
    """Rule of the steps. Weight decay is decoupled from the gradient in adamw and radam, and a part of it in the others."""
    lr: float = 1e-3
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.98)
    """With --optimizer adamw, adam or radam: decay of the two running means."""
    momentum: float = 0.0
    """With --optimizer sgd or rmsprop: decay of the running sum of the steps."""
    weight_decay: float = 0.0
    """Decay of the matrices; vectors are spared."""
    decay_vectors: bool = False
    """Let weight decay act on vectors (biases, gains) as well."""
    schedule: ScheduleName = "cosine"
    """After the warm-up. cosine: down to --eta-min along a half cosine by the last step; inverse-sqrt: with one over the
    square root of the step; constant; dev-performance: times --decay-rate when the validation loss no longer falls;
    step-decay: times --decay-rate after each of --decay-epochs."""
    warmup_steps: int = 50
    """Steps over which the learning rate rises linearly from zero."""
    eta_min: float = 0.0
    """With --schedule cosine: the rate at its end. With dev-performance or step-decay: the lowest rate."""
    decay_rate: float = 0.5
    """With --schedule dev-performance or step-decay: factor of one cut."""
    patience: int = 0
    """With --schedule dev-performance: validations without a better loss that it forgives before it cuts."""
    decay_epochs: tuple[int, ...] = ()
    """With --schedule step-decay: epochs, counted from 1, at whose ends it cuts."""
    anneal: int | None = None
    """With --schedule step-decay: it also cuts when a validation loss is worse than the best of all but this many before
    it; None: never."""
    lr_as_released: bool = False
    """The very rates of the released training scripts: the first step at the full rate, and a cosine that runs since step
    0, so that the rate falls at the end of the warm-up."""
    clip: float = 1.0
    """Largest norm of the gradient; longer ones are scaled down to it."""
    steps: int = 500
    """Optimizer steps of the whole run."""
    batch_size: int = 16
    """Lanes of text read side by side."""
    length: int = 64
    """Tokens of each lane in one segment."""
    variable_length: bool = False
    """Let the lengths of the segments vary about --length, drawn anew for every epoch."""
    batch_chunk: int = 1
    """Parts that a batch is split into, one after the other, to save memory: same gradient, but for dropout."""
    accumulate: int = 1
    """Consecutive segments whose gradients make up one step."""
    pretrain_steps: int = 0
    """First train the explicit stack for this many steps, then the equilibrium."""
    pretrain_depth: int = 4
    """With --pretrain-steps: blocks in that stack."""
    eval_depth: int | None = None
    """With --pretrain-steps: blocks in that stack when it is validated; None: --pretrain-depth."""
    minutes: float | None = None
    """Stop cleanly when training has taken this long, resumed parts included; the schedule still follows --steps."""

    def __post_init__(self) -> None:
        check_positive(self, "lr", "clip", "steps", "batch_size", "length", "batch_chunk", "accumulate", "minutes")
        check_positive(self, "pretrain_depth", "eval_depth", "anneal")
        check_not_negative(self, "weight_decay", "warmup_steps", "pretrain_steps", "eta_min", "patience")
        check(all(0 <= beta < 1 for beta in self.betas), "betas", self.betas, "each must be at least 0 and below 1")
        check(0 <= self.momentum < 1, "momentum", self.momentum, "give a number from 0 up to, not including, 1")
        check(0 < self.decay_rate < 1, "decay_rate", self.decay_rate, "give a number between 0 and 1")
        check(self.eta_min <= self.lr, "eta_min", self.eta_min, f"give at most --lr {self.lr}")
        rising = all(a < b for a, b in zip((0, *self.decay_epochs), self.decay_epochs, strict=False))
        check(rising, "decay_epochs", self.decay_epochs, "give rising numbers from 1 on")
        cuts = self.schedule == "step-decay"
        check(cuts or not self.decay_epochs, "decay_epochs", self.decay_epochs, "give --schedule step-decay as well")
        check(cuts or self.anneal is None, "anneal", self.anneal, "give --schedule step-decay as well")
        fits = self.momentum == 0 or self.optimizer in ("sgd", "rmsprop")
        check(fits, "momentum", self.momentum, f"{self.optimizer} has none; use sgd or rmsprop")
        chunks = f"give at most --batch-size {self.batch_size}"
        check(self.batch_chunk <= self.batch_size, "batch_chunk", self.batch_chunk, chunks)
