"""The learning rate over a run."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

import torch

from equilibria.train.optim_config import OptimConfig


def learning_rate(step: int, config: OptimConfig, *, cuts: int = 0) -> float:
    """The rate that step number `step` (from 0) uses, after `cuts` cuts (see `Cuts`).

    With W warm-up steps of S, the rate is lr (step + 1) / W while step < W, and then

    - cosine: eta_min + (lr - eta_min) (1 + cos(pi t)) / 2 with t = (step - W) / (S - W),
    - inverse-sqrt: lr sqrt(W / (step + 1)), with W = 1 where there is no warm-up,
    - constant: lr,
    - dev-performance and step-decay: lr decay_rate^cuts, at least eta_min.

    With `lr_as_released` the rates are those of the code released with Bai, Kolter and Koltun 2019.

    >>> [learning_rate(step, OptimConfig(lr=1.0, warmup_steps=2, steps=4)) for step in range(4)]
    [0.5, 1.0, 1.0, 0.5]
    """
    warmup, steps = config.warmup_steps, config.steps
    if config.lr_as_released:
        return _released(step, config, cuts)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule == "cosine":
        return _cosine(min(1.0, (step - warmup) / max(1, steps - warmup)), config)
    if config.schedule == "inverse-sqrt":
        return config.lr * math.sqrt(max(1, warmup) / (step + 1))
    return _cut(config.lr, cuts, config)


def _released(step: int, config: OptimConfig, cuts: int) -> float:
    """As the released scripts set the rate, after every step and hence one step late.

    The first step runs at the full rate. Step n of the warm-up then has lr n / W; cosine goes on at t = n / S, as if it
    had begun at step 0, and what has no formula of its own stays at the last rate of the warm-up, lr (W - 1) / W. Under
    inverse-sqrt step n has lr n / W^1.5 up to n = W, so that the first step changes nothing, and lr / sqrt(n) from there
    on. step-decay is the TrellisNet script's, which knows no warm-up.
    """
    lr, warmup = config.lr, config.warmup_steps
    if config.schedule == "inverse-sqrt":
        if step == 0 and warmup == 0:
            return lr
        return lr * (step**-0.5 if step > warmup else step / warmup**1.5)
    if config.schedule == "step-decay":
        return _cut(lr, cuts, config)
    if config.schedule == "cosine" and step >= max(1, warmup):
        return _cosine(step / config.steps, config)
    held = min(step, warmup - 1)
    return _cut(lr * held / warmup if held > 0 else lr, cuts, config)


def _cosine(progress: float, config: OptimConfig) -> float:
    return config.eta_min + 0.5 * (config.lr - config.eta_min) * (1 + math.cos(math.pi * progress))


def _cut(rate: float, cuts: int, config: OptimConfig) -> float:
    return max(rate * config.decay_rate**cuts, min(config.eta_min, rate))


@dataclass(kw_only=True)
class Cuts:
    """How often dev-performance or step-decay has cut the rate, and what the next cut depends on. Kept in checkpoints.

    dev-performance cuts when more than `patience` validations in a row were no better than the best before them, by a
    ten-thousandth of it: the rule of PyTorch's `ReduceLROnPlateau`. A cut in the warm-up has no effect, as the rate is
    still rising. step-decay cuts at the end of each of `decay_epochs`; with `anneal`, also at a validation whose loss is
    above the lowest of all but the last `anneal` before it: the rule of the released TrellisNet script.
    """

    number: int = 0
    """Cuts so far."""
    epochs: int = 0
    """Epochs over when step-decay last looked."""
    waited: int = 0
    """Validations in a row that were no better."""
    best: float | None = None
    """Lowest validation loss that counts."""
    losses: list[float] = field(default_factory=list)
    """The validation losses of step-decay."""

    def epochs_over(self, epochs: int, config: OptimConfig) -> None:
        """Tell that this many epochs are over."""
        if config.schedule == "step-decay":
            self.number += sum(self.epochs < end <= epochs for end in config.decay_epochs)
            self.epochs = epochs

    def validated(self, loss: float, step: int, config: OptimConfig) -> None:
        """Tell the loss of a validation after `step` steps; of the epochs that are over by then tell first."""
        if config.schedule == "dev-performance":
            if self.best is None or loss < self.best * (1 - 1e-4):
                self.best, self.waited = loss, 0
            else:
                self.waited += 1
            if self.waited > config.patience:
                self.waited = 0
                self.number += step >= config.warmup_steps - 1
        elif config.schedule == "step-decay" and config.anneal is not None:
            earlier = self.losses[: -config.anneal]
            just_cut = self.epochs in config.decay_epochs  # the script cuts once where both rules ask for it
            self.number += bool(earlier) and loss > min(earlier) and not just_cut
            self.losses.append(loss)

    def to_json(self) -> dict[str, Any]:
        """Plain values, for `Cuts(**values)`."""
        return dataclasses.asdict(self)


class LearningRate:
    """Keeps the rate of an optimizer at what `learning_rate` says."""

    def __init__(self, optimizer: torch.optim.Optimizer, config: OptimConfig, cuts: Cuts | None = None) -> None:
        self.optimizer, self.config = optimizer, config
        self.cuts = Cuts() if cuts is None else cuts
        self.rate = 0.0

    def set(self, step: int) -> None:
        """Make the rate that of step number `step`."""
        self.rate = learning_rate(step, self.config, cuts=self.cuts.number)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate
