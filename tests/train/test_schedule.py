from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from equilibria.train.optim_config import OptimConfig, ScheduleName
from equilibria.train.optimizer import make_optimizer
from equilibria.train.schedule import Cuts, LearningRate, learning_rate


def test_rises_linearly_then_falls_along_a_half_cosine():
    config = OptimConfig(lr=2.0, warmup_steps=4, steps=24)
    assert [learning_rate(step, config) for step in range(5)] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert learning_rate(14, config) == pytest.approx(1.0)  # half way from 4 to 24
    assert learning_rate(24, config) == pytest.approx(0.0, abs=1e-15)
    assert learning_rate(99, config) == pytest.approx(0.0, abs=1e-15)
    falling = [learning_rate(step, config) for step in range(4, 25)]
    assert falling == sorted(falling, reverse=True)


def test_cosine_matches_its_formula_and_ends_at_eta_min():
    config = OptimConfig(lr=1.0, warmup_steps=10, steps=110, eta_min=0.2)
    for step in (10, 37, 90):
        assert learning_rate(step, config) == pytest.approx(
            0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * (step - 10) / 100)), rel=1e-15
        )
    assert learning_rate(110, config) == learning_rate(999, config) == pytest.approx(0.2)


def test_constant_stays_and_no_warmup_starts_at_the_peak():
    assert learning_rate(10**6, OptimConfig(lr=3.0, schedule="constant")) == 3.0
    assert learning_rate(0, OptimConfig(lr=3.0, warmup_steps=0)) == 3.0
    assert learning_rate(3, OptimConfig(lr=1.0, warmup_steps=10, steps=5)) == 0.4  # shorter than its own warm-up


def test_inverse_square_root_peaks_at_the_end_of_the_warm_up():
    config = OptimConfig(lr=1.0, warmup_steps=4, schedule="inverse-sqrt")
    rates = [learning_rate(step, config) for step in range(100)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, pytest.approx(math.sqrt(4 / 5))]
    assert rates[99] == pytest.approx(0.2)  # sqrt(4 / 100)
    cold = OptimConfig(lr=1.0, warmup_steps=0, schedule="inverse-sqrt")
    assert [learning_rate(step, cold) for step in (0, 3)] == [1.0, 0.5]


def test_released_rates_are_the_recorded_ones(shared_golden: Path):
    cases = json.loads((shared_golden / "component_lr_schedule" / "config.json").read_text())["cases"]
    assert cases
    for case in cases:
        config = OptimConfig(
            lr=case["lr"],
            schedule="cosine" if case["scheduler"] == "cosine" else "inverse-sqrt",
            warmup_steps=case["warmup_step"],
            steps=case["max_step"],
            eta_min=case["eta_min"],
            lr_as_released=True,
        )
        mine = [learning_rate(step, config) for step in range(len(case["lr_at_step"]))]
        assert mine == pytest.approx(case["lr_at_step"], rel=1e-12, abs=0)


def released_rates(config: OptimConfig, losses: dict[int, float], steps: int) -> list[float]:
    """What the loop of the released Transformer script does to an optimizer, for constant and dev-performance."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=config.lr)
    plateau = ReduceLROnPlateau(optimizer, factor=config.decay_rate, patience=config.patience, min_lr=config.eta_min)
    rates = []
    for step in range(1, steps + 1):
        rates.append(optimizer.param_groups[0]["lr"])
        if step < config.warmup_steps:
            optimizer.param_groups[0]["lr"] = config.lr * step / config.warmup_steps
        if config.schedule == "dev-performance" and step in losses:
            plateau.step(losses[step])
    return rates


@pytest.mark.parametrize("warmup", [0, 1, 7])
@pytest.mark.parametrize("schedule", ["constant", "dev-performance"])
@pytest.mark.parametrize("patience", [0, 1])
def test_without_a_formula_the_rate_stays_where_the_released_script_leaves_it(
    schedule: ScheduleName, warmup: int, patience: int
):
    config = OptimConfig(
        lr=0.3, schedule=schedule, warmup_steps=warmup, patience=patience, eta_min=0.02, decay_rate=0.5, lr_as_released=True
    )
    # better, worse, worse by too little, better by too little, then never better
    values = [5.0, 5.1, 4.9, 4.8999, 4.9, *[5.0] * 12]
    losses = {3 * i: value for i, value in enumerate(values, start=1)}
    cuts, mine = Cuts(), []
    for step in range(60):
        mine.append(learning_rate(step, config, cuts=cuts.number))
        if step + 1 in losses:
            cuts.validated(losses[step + 1], step + 1, config)
    assert mine == pytest.approx(released_rates(config, losses, 60), rel=1e-12)
    assert (min(mine[warmup + 1 :]) < mine[warmup]) is (schedule == "dev-performance")


def trellis_rates(config: OptimConfig, losses: list[float]) -> list[float]:
    """The rate of each epoch, as the released TrellisNet script sets it at the end of the one before."""
    lr, seen, rates = config.lr, [], []
    for epoch, loss in enumerate(losses, start=1):
        rates.append(lr)
        stale = config.anneal is not None and len(seen) > config.anneal and loss > min(seen[: -config.anneal])
        if (stale or epoch in config.decay_epochs) and lr > config.eta_min * (1 + 1e-9):
            lr /= 10
        seen.append(loss)
    return rates


@pytest.mark.parametrize("anneal", [None, 1, 3])
def test_step_decay_cuts_when_the_trellisnet_script_does(anneal: int | None):
    config = OptimConfig(
        lr=1.0, schedule="step-decay", warmup_steps=0, decay_epochs=(4, 9), decay_rate=0.1, anneal=anneal, eta_min=1e-5
    )
    losses = [9.0, 8.0, 8.5, 7.0, 7.5, 7.4, 7.6, 6.0, 6.5, 6.4, 6.3, 6.2, 6.1]
    cuts, mine = Cuts(), []
    for epoch, loss in enumerate(losses, start=1):
        mine.append(learning_rate(epoch, config, cuts=cuts.number))
        cuts.epochs_over(epoch, config)
        cuts.epochs_over(epoch, config)  # as the loop does at every step
        cuts.validated(loss, epoch, config)
    assert mine == pytest.approx(trellis_rates(config, losses), rel=1e-12)
    assert (cuts.number > 2) is (anneal is not None)


def test_cuts_come_back_from_json():
    config = OptimConfig(schedule="dev-performance", patience=2)
    cuts = Cuts()
    for step, loss in enumerate([5.0, 5.0, 5.0, 5.0, 5.0], start=1000):
        cuts.validated(loss, step, config)
    assert cuts.number == 1
    assert Cuts(**json.loads(json.dumps(cuts.to_json()))) == cuts


def test_every_group_has_the_rate():
    config = OptimConfig(lr=0.5, warmup_steps=2)
    rate = LearningRate(make_optimizer(nn.Linear(2, 2), config), config)
    rate.set(0)
    assert [group["lr"] for group in rate.optimizer.param_groups] == [0.25, 0.25]
    assert rate.rate == 0.25
