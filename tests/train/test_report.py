"""What the last screen advises."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from equilibria.recipes import RECIPES
from equilibria.train.config import RunConfig
from equilibria.train.report import render
from equilibria.train.typed import add_command, options_of


def screen(
    *,
    steps: int = 100,
    minutes: float | None = None,
    config: RunConfig | None = None,
    typed: Sequence[str] = (),
    best_step: int | None = None,
    unconverged: float = 0.0,
) -> str:
    config = RECIPES["quickstart"]() if config is None else config
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, steps=100, minutes=minutes))
    test: dict[str, Any] = {
        "nll": 1.0, "perplexity": 2.7, "bits_per_byte": 2.0, "evaluations": 9.0, "residual": 1e-3, "unconverged": 0.0,
    }  # fmt: skip
    model: dict[str, Any] = {
        "depth": None, "parameters": 5, "steps": steps, "tokens": 10, "best_step": best_step or steps, "train_seconds": 1.0,
        "tokens_per_second": 10.0, "peak_memory_bytes": 1, "forward_evaluations": 9.0, "backward_evaluations": 4.0,
        "unconverged": unconverged, "test": test,
    }  # fmt: skip
    summary = {"recipe": config.recipe, "folder": "runs/q", "model": model, "sample": True, "seconds": 1.0}
    return render({**summary, "xz_bits_per_byte": 3.0}, config, typed)


def test_a_run_that_ran_out_of_time_is_given_more_time_and_keeps_its_schedule():
    advice = screen(steps=40, minutes=2.0)
    assert "--resume --run-dir runs/q --minutes 4" in advice
    assert "--steps" not in advice
    assert "--steps 200" in screen(steps=100, minutes=2.0)
    assert "--steps 200" in screen(steps=100, minutes=None)


def test_what_to_try_repeats_what_was_typed(tmp_path: Path):
    path = tmp_path / "command.txt"
    assert options_of(path) == []
    add_command(
        path, ["equilibria", "train", "text", "--run-dir", "x", "--data-dir", "my text", "--max_evals=3", "--no-twin"]
    )
    add_command(
        path, ["equilibria", "train", "text", "--resume", "--run-dir", "x", "--betas", "0.9", "0.98", "--steps", "40"]
    )
    typed = options_of(path)
    assert typed == ["--data-dir", "my text", "--max_evals=3", "--no-twin", "--betas", "0.9", "0.98", "--steps", "40"]
    config = RECIPES["text"]()
    data = dataclasses.replace(config.data, data_dir=Path("my text"))
    lines = screen(config=dataclasses.replace(config, data=data), typed=typed, best_step=20, unconverged=0.9).splitlines()
    commands = [line.split("equilibria ", 1)[1] for line in lines if "equilibria train" in line]
    common = "train text --no-twin --betas 0.9 0.98 --steps 40 --data-dir 'my text'"
    assert commands[0] == f"{common} --max-evals {2 * config.solver.max_evals}"
    assert commands[1] == f"{common.replace('text --no-twin', 'text --max_evals=3 --no-twin')} --dropout 0.1"


def test_dropout_to_try_is_an_option_that_the_model_has():
    config = RECIPES["penn-treebank-trellisnet-small"]()
    before = getattr(config.model, "output_dropout")  # noqa: B009 - of a TrellisNet
    assert f"--output-dropout {before + 0.1:g}" in screen(config=config, best_step=20)
