from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from equilibria.train.config import OptimConfig
from equilibria.train.schedule import lr_factor, make_optimizer, make_schedule


def test_rises_linearly_then_falls_along_a_half_cosine():
    config = OptimConfig(warmup_steps=4, steps=24)
    assert [lr_factor(step, config) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert lr_factor(14, config) == pytest.approx(0.5)  # half way from 4 to 24
    assert lr_factor(24, config) == pytest.approx(0.0, abs=1e-15)
    assert lr_factor(99, config) == pytest.approx(0.0, abs=1e-15)
    falling = [lr_factor(step, config) for step in range(4, 25)]
    assert falling == sorted(falling, reverse=True)


def test_constant_stays_and_no_warmup_starts_at_the_peak():
    assert lr_factor(10**6, OptimConfig(schedule="constant")) == 1.0
    assert lr_factor(0, OptimConfig(warmup_steps=0)) == 1.0
    assert lr_factor(3, OptimConfig(warmup_steps=10, steps=5)) == 0.4  # shorter than its own warm-up


def test_schedule_made_at_a_step_goes_on_as_one_that_got_there():
    config = OptimConfig(lr=0.1, warmup_steps=3, steps=12)
    whole_optimizer = make_optimizer(nn.Linear(2, 2), config)
    whole = make_schedule(whole_optimizer, config)
    rates = []
    for _ in range(12):
        rates.append(whole.get_last_lr()[0])
        whole_optimizer.step()
        whole.step()
    for start in (0, 2, 7):
        optimizer = make_optimizer(nn.Linear(2, 2), config)
        schedule = make_schedule(optimizer, config, step=start)
        resumed = []
        for _ in range(start, 12):
            assert optimizer.param_groups[0]["lr"] == schedule.get_last_lr()[0]
            resumed.append(schedule.get_last_lr()[0])
            optimizer.step()
            schedule.step()
        assert resumed == rates[start:]


def test_weight_decay_spares_vectors():
    model = nn.Linear(3, 2)
    optimizer = make_optimizer(model, OptimConfig(lr=0.5, weight_decay=0.1))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    weight, bias = model.weight.detach().clone(), model.bias.detach().clone()
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), weight * (1 - 0.5 * 0.1))
    assert torch.equal(model.bias, bias)


def test_cosine_matches_its_formula():
    config = OptimConfig(warmup_steps=10, steps=110)
    for step in (10, 37, 90):
        assert lr_factor(step, config) == 0.5 * (1 + math.cos(math.pi * (step - 10) / 100))
