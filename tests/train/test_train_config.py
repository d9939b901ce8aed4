from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from equilibria.cli.train import TrainOptions
from equilibria.models.deq_trellisnet import TrellisShape
from equilibria.recipes import RECIPES
from equilibria.solution import UserError
from equilibria.train.config import (
    FIXED_ON_RESUME,
    DataConfig,
    OptimConfig,
    RunConfig,
    SampleConfig,
    SolveConfig,
    TransformerModel,
    TrellisModel,
    changed_fields,
    from_json,
    load_config,
    to_json,
)


@pytest.mark.parametrize("recipe", RECIPES)
def test_json_gives_the_configuration_back(recipe: str):
    config = RECIPES[recipe]()
    assert config.recipe == recipe
    assert from_json(json.loads(json.dumps(to_json(config))), "stored") == config


def test_every_value_survives_json():
    config = RunConfig(
        recipe="text",
        model=TransformerModel(dropout=0.25, pre_norm=True, local_size=7, depth=3),
        solver=SolveConfig(method="broyden", rtol=1e-4, eval_rtol=1e-5, backward="phantom"),
        data=DataConfig(corpus="text", data_dir=Path("some/where"), vocab_size=512),
        optim=OptimConfig(betas=(0.8, 0.95), schedule="constant", minutes=1.5),
        twin=False,
    )
    again = from_json(json.loads(json.dumps(to_json(config))), "stored")
    assert again == config
    assert isinstance(again.data.data_dir, Path)
    assert isinstance(again.optim.betas, tuple)


@pytest.mark.parametrize(
    ("group", "key", "value", "named"),
    [
        ("optim", "stepz", 3, "stepz"),
        ("optim", "steps", "many", "steps"),
        ("optim", "steps", 0, "--steps is 0"),
        ("solver", "method", "newton", "newton"),
        ("model", "d_model", None, "d_model"),
        ("model", "family", "lstm", "transformer or trellisnet"),
        ("model", "d_hidden", 3, "d_hidden"),
    ],
)
def test_wrong_json_is_named(group: str, key: str, value: Any, named: str):
    values = to_json(RECIPES["quickstart"]())
    values[group][key] = value
    with pytest.raises(UserError, match=named) as caught:
        from_json(values, "config.json")
    assert str(caught.value).startswith("config.json ")


def test_json_names_the_family():
    families = {name: to_json(RECIPES[name]())["model"]["family"] for name in RECIPES}
    assert families["quickstart"] == "transformer"
    assert families["wikitext-103-trellisnet"] == "trellisnet"


def test_unreadable_json_is_a_user_error(tmp_path: Path):
    path = tmp_path / "config.json"
    with pytest.raises(UserError, match=r"config\.json"):
        load_config(path)
    path.write_text("{")
    with pytest.raises(UserError, match=r"config\.json"):
        load_config(path)
    path.write_text("[]")
    with pytest.raises(UserError, match=r"config\.json"):
        load_config(path)


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (OptimConfig, {"steps": 0}),
        (OptimConfig, {"lr": float("nan")}),
        (OptimConfig, {"lr": float("inf")}),
        (SolveConfig, {"jacobian_weight": float("inf")}),
        (RunConfig, {"seed": -1, "recipe": "text"}),
        (OptimConfig, {"batch_size": -1}),
        (OptimConfig, {"minutes": 0.0}),
        (OptimConfig, {"betas": (0.9, 1.0)}),
        (TransformerModel, {"d_model": 10, "n_head": 4}),
        (TransformerModel, {"d_model": 3, "n_head": 3}),
        (TransformerModel, {"dropout": 1.0}),
        (TransformerModel, {"depth": 0}),
        (TransformerModel, {"attention_dropout": -0.1}),
        (TrellisModel, {"d_hidden": 0}),
        (TrellisModel, {"weight_dropout": 1.0}),
        (TransformerModel, {"cutoffs": (40, 10)}),
        (TransformerModel, {"cutoffs": (10, 10)}),
        (TrellisModel, {"cutoffs": (0, 10)}),
        (TrellisModel, {"cutoffs": (-1,)}),
        (SolveConfig, {"backward_rtol": 0.0, "backward_atol": 0.0}),
        (SolveConfig, {"eval_rtol": 0.0, "eval_atol": 0.0}),
        (SolveConfig, {"max_evals_delta": 16}),
        (SolveConfig, {"backward_method": "picard", "backward": "phantom"}),
        (SolveConfig, {"rtol": 0.0, "atol": 0.0}),
        (SolveConfig, {"damping": 0.0}),
        (SolveConfig, {"max_evals": 0}),
        (DataConfig, {"vocab_size": 255}),
        (SampleConfig, {"sample_temperature": -0.1}),
    ],
)
def test_values_out_of_range_name_the_option(kind: type, values: dict[str, Any]):
    option = next(iter(values)).replace("_", "-")
    with pytest.raises(UserError, match=f"^--{option} is .*; ") as caught:
        kind(**values)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"d_embed": 8, "d_output": 16},
            "tie_weights is True, but the word vectors have width d_embed 8 and the softmax reads d_output 16; make the "
            "two equal, leave the weights untied, or give n_experts, for a mixture of softmaxes reads vectors of width "
            "d_embed",
        ),
        (
            {"n_experts": 2, "cutoffs": (3, 7)},
            "n_experts is 2 and cutoffs is (3, 7), but a mixture of softmaxes is not split; give n_experts 0 or no cutoffs",
        ),
        ({"cutoffs": (7, 3)}, "cutoffs is (7, 3); give rising numbers from 1 on"),
        ({"inject_std": 0.0}, "inject_std is 0.0; give a finite number above 0"),
    ],
)
def test_a_shape_objects_in_the_style_of_the_library_and_of_the_command_line(values: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=re.escape(message) + "$"):
        TrellisShape(**values)
    for name in ("tie_weights", "d_embed", "d_output", "n_experts", "cutoffs", "inject_std"):
        message = message.replace(name, f"--{name.replace('_', '-')}")
    with pytest.raises(UserError, match=re.escape(message) + "$"):
        TrellisModel(**values)


@pytest.mark.parametrize(
    ("kind", "choice", "names"),
    [
        (OptimConfig, "--optimizer", ("betas", "momentum")),
        (OptimConfig, "--schedule", ("eta_min", "decay_rate", "patience", "decay_epochs", "anneal")),
        (OptimConfig, "--pretrain-steps", ("pretrain_depth", "eval_depth")),
        (SolveConfig, "--method", ("history", "damping")),
        (SolveConfig, "--backward", ("backward_method", "backward_rtol", "backward_atol", "backward_max_evals")),
        (SolveConfig, "--backward", ("phantom_steps",)),
        (SolveConfig, "--jacobian-weight", ("jacobian_share", "jacobian_every")),
        (SolveConfig, "--jacobian-every", ("jacobian_increment",)),
        (TrellisShape, "n_experts", ("latent_dropout",)),
    ],
)
def test_an_option_that_some_choices_alone_read_says_so(kind: type, choice: str, names: tuple[str, ...]):
    (defined,) = ast.parse(inspect.getsource(kind)).body
    assert isinstance(defined, ast.ClassDef)
    texts = {
        ast.unparse(field.target): ast.literal_eval(text.value)
        for field, text in pairwise(defined.body)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
    }
    for name in names:
        assert re.match(rf"With {choice}[ :]", texts[name]), name


def test_option_names_are_unique_across_groups():
    for model in (TransformerModel, TrellisModel):
        groups = (TrainOptions, RunConfig, model, SolveConfig, DataConfig, OptimConfig, SampleConfig)
        names = [item.name for group in groups for item in dataclasses.fields(group)]
        assert len(names) == len(set(names))


def test_changed_fields_of_a_resumed_run():
    old = RECIPES["quickstart"]()
    assert changed_fields(old, old, FIXED_ON_RESUME) == []
    longer = dataclasses.replace(old, optim=dataclasses.replace(old.optim, steps=9999, lr=1.0))
    assert changed_fields(old, longer, FIXED_ON_RESUME) == []
    other = dataclasses.replace(old, optim=dataclasses.replace(old.optim, optimizer="sgd", momentum=0.9))
    assert changed_fields(old, other, FIXED_ON_RESUME) == ["optimizer adamw -> sgd", "momentum 0.0 -> 0.9"]
    assert isinstance(old.model, TransformerModel)
    wider = dataclasses.replace(old, model=dataclasses.replace(old.model, d_model=2 * old.model.d_model, dropout=0.3))
    assert changed_fields(old, wider, FIXED_ON_RESUME) == [f"d_model {old.model.d_model} -> {2 * old.model.d_model}"]


def test_twin_is_the_same_run_with_a_stack():
    config = dataclasses.replace(RECIPES["quickstart"](), twin_depth=5)
    twin = config.for_twin()
    assert config.wants_twin
    assert not twin.wants_twin
    assert twin.model == dataclasses.replace(config.model, depth=5)
    assert twin.optim == dataclasses.replace(config.optim, pretrain_steps=0)
    assert (twin.data, twin.seed) == (config.data, config.seed)
    assert not dataclasses.replace(config, model=twin.model).wants_twin
