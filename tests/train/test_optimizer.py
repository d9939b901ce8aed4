from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from equilibria.nn.parametrizations import weight_norm
from equilibria.train.checkpoint import load_tensors, save_checkpoint
from equilibria.train.optim_config import OptimConfig, OptimizerName
from equilibria.train.optimizer import make_optimizer
from equilibria.train.whole import load_whole_optimizer, whole_optimizer

MOMENTUM = {"sgd": 0.9, "rmsprop": 0.9}


@pytest.mark.parametrize("decay_vectors", [False, True])
def test_weight_decay_spares_vectors_unless_told(decay_vectors: bool):
    model = nn.Linear(3, 2)
    optimizer = make_optimizer(model, OptimConfig(lr=0.5, weight_decay=0.1, decay_vectors=decay_vectors))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    weight, bias = model.weight.detach().clone(), model.bias.detach().clone()
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), weight * (1 - 0.5 * 0.1))
    torch.testing.assert_close(model.bias.detach(), bias * (1 - 0.5 * 0.1 * decay_vectors))


def test_weight_decay_spares_the_gains_of_weight_norm():
    model = nn.Sequential(weight_norm(nn.Linear(3, 2)), weight_norm(nn.Conv1d(3, 2, 2)))
    decayed, spared = make_optimizer(model, OptimConfig(weight_decay=0.1)).param_groups
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert {names[p].rsplit(".", 1)[-1] for p in decayed["params"]} == {"original1"}
    assert {names[p].rsplit(".", 1)[-1] for p in spared["params"]} == {"original0", "bias"}
    assert len(decayed["params"]) + len(spared["params"]) == 6


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    optimizer.zero_grad()
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))
    model(x).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("name", get_args(OptimizerName))
def test_goes_on_from_a_checkpoint_as_if_nothing_had_happened(name: OptimizerName, momentum: bool, tmp_path: Path):
    config = OptimConfig(optimizer=name, lr=0.05, weight_decay=0.1, momentum=MOMENTUM.get(name, 0.0) if momentum else 0.0)
    model = nn.Linear(3, 2)
    optimizer = make_optimizer(model, config)
    for seed in range(8):
        step(model, optimizer, seed)
    save_checkpoint(tmp_path / "checkpoint", {}, optimizer=whole_optimizer(model, optimizer))
    other = nn.Linear(3, 2)
    other.load_state_dict(model.state_dict())
    again = make_optimizer(other, config)
    load_whole_optimizer(other, again, load_tensors(tmp_path / "checkpoint", "optimizer"))
    for seed in range(8, 12):
        step(model, optimizer, seed)
        step(other, again, seed)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_the_names_choose_different_rules():
    ends = set()
    for name in get_args(OptimizerName):
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        optimizer = make_optimizer(model, OptimConfig(optimizer=name, lr=0.05, weight_decay=0.1))
        for seed in range(8):
            step(model, optimizer, seed)
        ends.add(round(float(model.weight.detach().sum()), 9))
    assert len(ends) == len(get_args(OptimizerName))


@pytest.mark.parametrize("variant", ["default", "weight_decay", "betas"])
def test_radam_takes_the_recorded_steps(shared_golden: Path, variant: str):
    """Steps on 1/2 sum h (x - x*)^2, recorded from the original's RAdam."""
    folder = shared_golden / "component_radam"
    tensors = load_file(folder / "tensors.safetensors")
    given = json.loads((folder / "config.json").read_text())["variants"][variant]
    config = OptimConfig(
        optimizer="radam",
        lr=given["lr"],
        betas=tuple(given.get("betas", (0.9, 0.999))),
        weight_decay=given.get("weight_decay", 0.0),
        decay_vectors=True,
    )
    model = nn.Module()
    model.x = nn.Parameter(tensors["x0"].clone())
    optimizer = make_optimizer(model, config)
    for group in optimizer.param_groups:
        group["eps"] = given.get("eps", 1e-8)
    for expected in tensors[f"{variant}/float64"][1:]:
        model.x.grad = tensors["h"] * (model.x.detach() - tensors["x_star"])
        optimizer.step()
        torch.testing.assert_close(model.x.detach(), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"momentum": 0.9}, "--momentum is 0.9; adamw has none"),
        ({"decay_epochs": (3,)}, "give --schedule step-decay"),
        ({"schedule": "step-decay", "decay_epochs": (3, 2)}, "rising"),
        ({"schedule": "step-decay", "decay_epochs": (0,)}, "rising"),
        ({"anneal": 5}, "give --schedule step-decay"),
        ({"eta_min": 1.0}, "--eta-min is 1.0; give at most --lr"),
        ({"decay_rate": 1.0}, "--decay-rate is 1.0"),
        ({"batch_chunk": 17}, "--batch-chunk is 17; give at most --batch-size 16"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], words: str):
    with pytest.raises(ValueError, match=words):
        OptimConfig(**options)
