"""Optimizers, by name."""

from __future__ import annotations

from typing import assert_never

import torch
from torch import nn

from equilibria.train.optim_config import OptimConfig


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """The optimizer that the configuration names, on every parameter that is trained.

    Weight decay acts on matrices alone unless `decay_vectors`: vectors are biases and gains, whose size carries no
    capacity. The gains of weight norm are vectors too, whatever their shape: (out, 1) or (out, 1, 1). RAdam's
    decay is decoupled, as in the code released with its paper (Liu et al., ICLR 2020).

    >>> type(make_optimizer(nn.Linear(2, 2), OptimConfig(optimizer="radam"))).__name__
    'RAdam'
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decayed = [p for p in parameters if config.decay_vectors or not _is_vector(p)]
    spared = [p for p in parameters if not config.decay_vectors and _is_vector(p)]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": spared, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    match config.optimizer:
        case "adamw":
            return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas)
        case "adam":
            return torch.optim.Adam(groups, lr=config.lr, betas=config.betas)
        case "radam":
            return torch.optim.RAdam(groups, lr=config.lr, betas=config.betas, decoupled_weight_decay=True)
        case "sgd":
            return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)
        case "adagrad":
            return torch.optim.Adagrad(groups, lr=config.lr)
        case "rmsprop":
            return torch.optim.RMSprop(groups, lr=config.lr, momentum=config.momentum)
        case name:
            assert_never(name)


def _is_vector(parameter: nn.Parameter) -> bool:
    return sum(size > 1 for size in parameter.shape) < 2
