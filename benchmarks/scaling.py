"""What many processes cost: the spread of evaluations that they wait for, and the bytes that they send.

    python benchmarks/scaling.py        # a few minutes on one core

A solve ends when the last row of its batch has converged, and a step when the last process has solved its own. How many
steps each row needs is measured while a small model trains; what N processes wait for is drawn from that (rows are
independent of each other). Bytes are counted from the parameters of the recipes.
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import torch
from harness import save

from equilibria.recipes import RECIPES
from equilibria.recipes.build import build_corpus, build_model
from equilibria.train.interrupt import StopRequest
from equilibria.train.loop import Trainer
from equilibria.train.run_folder import RunFolder

STEPS, MEASURED = 150, 60
BUDGETS = (12, 30)  # of the quickstart, and one that hardly any row spends
ROWS = (4, 16, 64)  # of each process
PROCESSES = (1, 2, 8, 64, 512)
VOCABULARY = {"wikitext-103-transformer": 267_735, "wikitext-103-transformer-medium": 267_735, "quickstart": 2048}
STEP_SECONDS = (0.5, 1.0)  # assumed, of one process
GPUS, BYTES_PER_SECOND = 8, 50e9  # of a machine; of each GPU to other machines (400 Gb/s)


def main() -> None:
    torch.set_num_threads(1)
    steps = histogram(measure())
    save(
        "scaling",
        {
            "command": "python benchmarks/scaling.py",
            "steps_per_row": steps,
            "stragglers": {f"budget {budget}": stragglers(steps, budget) for budget in BUDGETS},
            "bytes": {name: sent(name) for name in VOCABULARY},
        },
    )


def measure() -> torch.Tensor:
    """Steps (solves, B) that each row of a training batch needed, with a budget that few of them spend."""
    config = RECIPES["quickstart"]()
    config = dataclasses.replace(
        config,
        solver=dataclasses.replace(config.solver, max_evals=max(BUDGETS)),
        optim=dataclasses.replace(config.optim, steps=STEPS, batch_size=64, length=32, minutes=None),
        eval_every=None,
        checkpoint_every=None,
        trackers=("none",),
    )
    corpus = build_corpus(config.data)
    torch.manual_seed(config.seed)
    found: list[torch.Tensor] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = RunFolder(Path(scratch))
        folder.store_config(config)
        trainer = Trainer(build_model(config, corpus.tokenizer.size), corpus, config, folder, stop=StopRequest())

        def keep(module: Any, inputs: Any, output: Any) -> None:
            if trainer.state.step >= STEPS - MEASURED:
                found.extend(stats.steps for stats in output.stats)

        trainer.model.register_forward_hook(keep)
        for step in range(STEPS):
            trainer._step()
            if step % 10 == 9:
                print(f"step {step + 1}/{STEPS}  {trainer.recorder.window.status()}", flush=True)
    return torch.stack(found)


def histogram(steps: torch.Tensor) -> dict[str, int]:
    values, counts = steps.unique(return_counts=True)
    return {str(value): count for value, count in zip(values.tolist(), counts.tolist(), strict=True)}


def stragglers(histogram: dict[str, int], budget: int) -> list[dict[str, float]]:
    """Mean of the most steps among the rows of one process, and among those of all: their ratio is the efficiency.

    Rows are taken as independent, so that the most of n has the distribution F^n, F that of one row.
    """
    values = torch.tensor([min(int(value), budget) for value in histogram], dtype=torch.float64)
    below = torch.tensor(list(histogram.values()), dtype=torch.float64).cumsum(0) / sum(histogram.values())

    def most(count: int) -> float:
        powers = below**count
        return float((values * powers.diff(prepend=powers.new_zeros(1))).sum())

    return [
        {"rows": own, "processes": count, "steps": most(own * count), "efficiency": most(own) / most(own * count)}
        for own in ROWS
        for count in PROCESSES
    ]


def sent(name: str) -> dict[str, float]:
    """Bytes per process and step, and the share of a step that sending them takes if nothing else goes on meanwhile."""
    config = RECIPES[name]()
    with torch.device("meta"):
        model = build_model(config, VOCABULARY[name])
    count = sum(parameter.numel() for parameter in model.parameters())
    found: dict[str, float] = {"parameters": count, "gradient_bytes": 4 * count}
    for machines in (1, 8, 64):
        n = GPUS * machines
        found[f"ddp_bytes_{n}"] = 2 * (n - 1) / n * 4 * count
        found[f"fsdp_bytes_{n}"] = 2 * (n - 1) / n * 4 * count
        found[f"ddp_state_bytes_{n}"] = 16 * count
        found[f"fsdp_state_bytes_{n}"] = 8 * count + 16 * count / n
        # Eight GPUs of a machine send side by side, each its eighth of what leaves the machine.
        seconds = 0.0 if machines == 1 else 2 * (machines - 1) / machines * 4 * count / (GPUS * BYTES_PER_SECOND)
        found[f"seconds_between_machines_{n}"] = seconds
        for step in STEP_SECONDS:
            found[f"efficiency_{n}_step_{step:g}s"] = step / (step + seconds)
    return found


if __name__ == "__main__":
    main()
