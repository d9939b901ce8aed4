"""The learning rate over a run."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from equilibria.train.config import OptimConfig


def lr_factor(step: int, config: OptimConfig) -> float:
    """Share of the peak rate that step number `step` (from 0) uses.

    With W warm-up steps of S: (step + 1) / W while step < W, then (1 + cos(pi t)) / 2 with
    t = (step - W) / (S - W), or 1 when the schedule is constant.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    decay_steps = max(1, config.steps - config.warmup_steps)
    progress = min(1.0, (step - config.warmup_steps) / decay_steps)
    return 0.5 * (1 + math.cos(math.pi * progress))


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only: vectors are biases and gains, whose size carries no capacity."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=config.lr, betas=config.betas)


def make_schedule(optimizer: torch.optim.Optimizer, config: OptimConfig, *, step: int = 0) -> LambdaLR:
    """The schedule as it stands before step number `step`; it depends on nothing else, so nothing of it is stored."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] = config.lr
    return LambdaLR(optimizer, lambda at: lr_factor(at, config), last_epoch=step - 1)
