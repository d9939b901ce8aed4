"""What the last screen advises."""

from __future__ import annotations

import dataclasses
from typing import Any

from equilibria.recipes import RECIPES
from equilibria.train.report import render


def screen(*, steps: int, minutes: float | None) -> str:
    config = RECIPES["quickstart"]()
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, steps=100, minutes=minutes))
    test: dict[str, Any] = {
        "nll": 1.0, "perplexity": 2.7, "bits_per_byte": 2.0, "evaluations": 9.0, "residual": 1e-3, "unconverged": 0.0,
    }  # fmt: skip
    model: dict[str, Any] = {
        "depth": None, "parameters": 5, "steps": steps, "tokens": 10, "best_step": steps, "train_seconds": 1.0,
        "tokens_per_second": 10.0, "peak_memory_bytes": 1, "forward_evaluations": 9.0, "backward_evaluations": 4.0,
        "unconverged": 0.0, "test": test,
    }  # fmt: skip
    summary = {"recipe": "quickstart", "folder": "runs/q", "model": model, "sample": True, "seconds": 1.0}
    return render({**summary, "xz_bits_per_byte": 3.0}, config)


def test_a_run_that_ran_out_of_time_is_given_more_time_and_keeps_its_schedule():
    advice = screen(steps=40, minutes=2.0)
    assert "--resume --run-dir runs/q --minutes 4" in advice
    assert "--steps" not in advice
    assert "--steps 200" in screen(steps=100, minutes=2.0)
    assert "--steps 200" in screen(steps=100, minutes=None)
