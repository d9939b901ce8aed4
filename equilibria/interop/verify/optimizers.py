"""RAdam, which is PyTorch's, and the schedules of the learning rate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from equilibria.interop.verify.cases import Case
from equilibria.interop.verify.report import Report, relative
from equilibria.interop.verify.tolerances import Limits
from equilibria.train.optim_config import OptimConfig
from equilibria.train.schedule import learning_rate

SCHEDULES = {"cosine": "cosine", "inv_sqrt": "inverse-sqrt", "constant": "constant"}


def check_radam(case: Case, dtype: torch.dtype, limits: Limits, report: Report) -> None:
    """On 0.5 Σ hᵢ (xᵢ - x*ᵢ)², the gradient given.

    Where groups have rates of their own, ours are what they say. The original takes the first's for all: only that group is
    compared.
    """
    precision = str(dtype).removeprefix("torch.")
    recorded = case.tensors("tensors", dtype)
    (limit,) = limits[precision]
    for name, options in case.config["variants"].items():
        if f"{name}/{precision}" not in recorded:
            continue
        theirs = recorded[f"{name}/{precision}"]  # (steps, D), from x0 on, or (steps, groups, D) without it
        groups = isinstance(options["lr"], list)
        rates = options["lr"] if groups else [options["lr"]]
        ours = _steps(recorded, rates, options, len(theirs) - (0 if groups else 1))
        if groups:
            ours, theirs = ours[1:, 0], theirs[:, 0]
            name = f"{name}: the first; ours go by their own rates"
        else:
            ours = ours[:, 0]
        worst = max(relative(one, other) for one, other in zip(ours, theirs, strict=True))
        report.add("steps of groups" if groups else "steps", worst, limit, name)


def _steps(recorded: Mapping[str, Tensor], rates: list[float], options: Mapping[str, Any], steps: int) -> Tensor:
    """(1 + steps, groups, D)"""
    h, goal = recorded["h"], recorded["x_star"]
    groups = [recorded["x0"].clone().requires_grad_() for _ in rates]
    optimizer = torch.optim.RAdam(
        [{"params": [x], "lr": lr} for x, lr in zip(groups, rates, strict=True)],
        betas=tuple(options.get("betas", (0.9, 0.999))),
        eps=options.get("eps", 1e-8),
        weight_decay=options.get("weight_decay", 0.0),
        decoupled_weight_decay=True,
    )
    seen = [torch.stack([x.detach().clone() for x in groups])]
    for _ in range(steps):
        for x in groups:
            x.grad = h * (x.detach() - goal)
        optimizer.step()
        seen.append(torch.stack([x.detach().clone() for x in groups]))
    return torch.stack(seen)


def check_schedule(case: Case, dtype: torch.dtype, limits: Limits, report: Report) -> None:
    (limit,) = limits["lr_at_step"]
    for said in case.config["cases"]:
        config = OptimConfig(
            schedule=SCHEDULES[said["scheduler"]],  # pyright: ignore[reportArgumentType]
            lr=said["lr"],
            warmup_steps=said["warmup_step"],
            steps=said["max_step"],
            eta_min=said["eta_min"],
            lr_as_released=True,
        )
        theirs = torch.tensor([float(rate) for rate in said["lr_at_step"]], dtype=dtype)
        ours = torch.tensor([learning_rate(step, config) for step in range(len(theirs))], dtype=dtype)
        error = torch.where(theirs == 0, ours.abs(), (ours - theirs).abs() / theirs.abs().clamp_min(1e-300)).max()
        report.add("lr_at_step", float(error), limit, f"{said['scheduler']}, warm-up {said['warmup_step']}")
