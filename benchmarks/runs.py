"""Training runs that benchmarks compare: a DEQ beside its explicit twin, by the very commands of a user."""

from __future__ import annotations

import dataclasses
import json
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from equilibria.cli.load import load_run
from equilibria.train.run_folder import read_metrics


@dataclass(frozen=True, kw_only=True)
class Run:
    """One model to train: `equilibria train RECIPE`."""

    recipe: str
    depth: int | None = None
    """Blocks of an explicit stack; None for the equilibrium."""

    @property
    def name(self) -> str:
        """Of its folder."""
        return self.recipe if self.depth is None else f"{self.recipe}-twin"

    @property
    def shown(self) -> str:
        """The command without what depends on the machine."""
        depth = "" if self.depth is None else f" --depth {self.depth} --pretrain-steps 0 --jacobian-weight 0"
        return f"equilibria train {self.recipe} --no-twin --threads 1{depth}"

    def twin(self, depth: int) -> Run:
        """The explicit stack with the same options."""
        return dataclasses.replace(self, depth=depth)


def train(runs: Sequence[Run], folder: Path, data_dirs: Mapping[str, Path | None], at_once: int = 2) -> None:
    """Train those that have no summary yet, `at_once` side by side, one thread each."""

    def command(run: Run) -> list[str]:
        parts = [sys.executable, "-m", *shlex.split(run.shown), "--run-dir", str(folder / run.name)]
        data_dir = data_dirs.get(run.recipe)
        return parts if data_dir is None else [*parts, "--data-dir", str(data_dir)]

    def start(run: Run) -> None:
        print(shlex.join(command(run)), flush=True)
        subprocess.run(command(run), check=True)

    waiting = [run for run in runs if not (folder / run.name / "summary.json").is_file()]
    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(start, waiting))


def describe(run: Run, folder: Path, data_dir: Path | None) -> dict[str, Any]:
    """What one model learned, on whole splits, and what that took."""
    loaded = load_run(folder / run.name)
    corpus = loaded.corpus(data_dir)
    valid, test = loaded.evaluate(corpus, "valid"), loaded.evaluate(corpus, "test")
    model = json.loads(loaded.folder.summary.read_text(encoding="utf-8"))["model"]
    last = [row for row in read_metrics(loaded.folder.metrics) if "forward/residual" in row][-10:]
    return {
        "command": run.shown,
        "seed": loaded.config.seed,
        "parameters": sum(parameter.numel() for parameter in loaded.model().parameters()),
        "training_tokens": model["tokens"],
        "steps": model["steps"],
        "valid_loss": valid.nll,
        "test_loss": test.nll,
        "minutes": model["train_seconds"] / 60,
        "forward_evaluations": model["forward_evaluations"],
        "backward_evaluations": model["backward_evaluations"],
        "final_training_residual": sum(row["forward/residual"] for row in last) / len(last) if last else None,
        "test_evaluations": test.evaluations,
        "test_residual": test.residual,
        "test_unconverged": test.unconverged,
        "peak_memory_mib": model["peak_memory_bytes"] / 2**20,
    }


def check_fair(models: dict[str, dict[str, Any]]) -> None:
    """Equal parameters, training tokens, steps and seeds, or there is no comparison."""
    for key in ("parameters", "training_tokens", "steps", "seed"):
        values = {name: row[key] for name, row in models.items()}
        if len(set(values.values())) != 1:
            raise SystemExit(f"the runs differ in {key}: {values}")
