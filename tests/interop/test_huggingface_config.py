"""Configurations: every field of ours by its name, nothing unknown, and the same model after a round trip."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from equilibria.interop.huggingface import DEQTransformerConfig, DEQTrellisNetConfig
from equilibria.interop.huggingface.configuration import CONFIGS, STEPPED
from equilibria.recipes.build import build_solver, eval_stopping
from equilibria.train.config import RunConfig, SolveConfig, TransformerModel, TrellisModel
from equilibria.train.solve_config import SolveConfig as Solves


@pytest.mark.parametrize("family", ["transformer", "trellisnet"])
def test_every_field_of_a_run_is_kept(family: str, tmp_path: Path) -> None:
    models: dict[str, Any] = {
        "transformer": TransformerModel(d_model=12, n_head=2, cutoffs=(3, 7), div_val=2, local_size=4, pre_norm=True),
        "trellisnet": TrellisModel(d_embed=8, d_output=8, kernel_size=3, n_experts=2, latent_dropout=0.2),
    }
    solver = SolveConfig(method="broyden", history=9, rtol=1e-4, eval_max_evals=70, backward="neumann", phantom_steps=3)
    run = RunConfig(recipe="text", model=models[family], solver=solver)
    config = CONFIGS[family].from_run_config(run, 50)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is CONFIGS[family]
    assert loaded.vocab_size == 50
    assert loaded.run_config().model == run.model
    assert loaded.run_config().solver == run.solver
    assert build_solver(loaded.run_config().solver) == build_solver(solver)
    assert loaded.eval_stopping() == eval_stopping(solver)


def test_fields_that_count_steps_of_our_loop_are_left_out() -> None:
    names = {item.name for item in dataclasses.fields(Solves)}
    assert set(STEPPED) < names
    assert not set(STEPPED) & set(DEQTransformerConfig().to_dict())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"d_modle": 16}, "no field 'd_modle'; did you mean d_model"),
        ({"kernel_size": 3}, "no field 'kernel_size'"),
        ({"d_model": 15, "n_head": 2}, "d_model is 15; give an even multiple of n_head 2"),
        ({"rtol": 0.0, "atol": 0.0}, "rtol is 0.0; it and atol cannot both be 0"),
        ({"method": "picrad"}, "picrad"),
        ({"method": "picard", "backward": "shine"}, "give method anderson or broyden"),
        ({"dropout": 1.5}, "dropout is 1.5"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"window": 0}, "window is 0"),
        ({"d_model": "wide"}, "d_model"),
    ],
)
def test_what_is_unknown_or_does_not_go_together_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        DEQTransformerConfig(**values)
    assert "--" not in str(caught.value)


def test_names_of_transformers_stand_for_ours() -> None:
    config = DEQTransformerConfig(hidden_size=24, num_attention_heads=3, tie_word_embeddings=False)
    assert (config.run_config().model.d_model, config.run_config().model.n_head) == (24, 3)  # pyright: ignore
    assert not config.run_config().model.tie_weights
    assert DEQTrellisNetConfig(d_embed=5, hidden_size=5).run_config().model == TrellisModel(d_embed=5, d_output=5)


def test_a_field_may_be_changed_while_loading(tmp_path: Path) -> None:
    DEQTransformerConfig(rtol=1e-2).save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path, rtol=1e-5).run_config().solver.rtol == 1e-5
