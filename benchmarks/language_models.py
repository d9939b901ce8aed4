"""DEQ-Transformer against its explicit twin on WikiText-2 and Penn Treebank: equal parameters, tokens and recipe.

For each corpus the two are trained side by side, one thread each, by the very commands printed; runs that are already
complete are kept. Then both are evaluated on the whole validation and test splits.

    python benchmarks/language_models.py --data-dir DIR [--runs runs] [--collect]
"""

from __future__ import annotations

import json
import math
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from harness import save

from equilibria.cli.load import load_run
from equilibria.data import load_corpus
from equilibria.train.run_folder import read_metrics

CORPORA = ("penn-treebank", "wikitext-2")
TWIN_DEPTH = 8


@dataclass(frozen=True, kw_only=True)
class Options:
    """Train and compare."""

    data_dir: Path
    """Folder that holds penn-treebank/ and wikitext-2/."""
    runs: Path = Path("runs")
    """Where the runs are, or go."""
    collect: bool = False
    """Train nothing; evaluate the runs that are there."""


def main(options: Options) -> None:
    rows: dict[str, dict[str, Any]] = {}
    for corpus in CORPORA:
        folders = {"DEQ": options.runs / corpus, "twin": options.runs / f"{corpus}-twin"}
        if not options.collect:
            train(corpus, folders, options.data_dir)
        rows[corpus] = {name: describe(folder, options.data_dir) for name, folder in folders.items()}
        check(rows[corpus])
        for name, row in rows[corpus].items():
            print(f"{corpus:15}{name:6}" + "  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    save("language_models", {"twin_depth": TWIN_DEPTH, "corpora": rows})


def train(corpus: str, folders: dict[str, Path], data_dir: Path) -> None:
    """Both models of one corpus, side by side."""
    running = []
    for name, folder in folders.items():
        if (folder / "summary.json").is_file():
            continue
        command = f"-m equilibria train {corpus} --data-dir {shlex.quote(str(data_dir))} --no-twin --threads 1"
        command += f" --run-dir {shlex.quote(str(folder))}" + (f" --depth {TWIN_DEPTH}" if name == "twin" else "")
        print(f"python {command}", flush=True)
        running.append(subprocess.Popen([sys.executable, *shlex.split(command)]))
    if any(process.wait() for process in running):
        raise SystemExit("training failed")


def describe(folder: Path, data_dir: Path) -> dict[str, Any]:
    """One model: what it learned, on whole splits, and what that took."""
    run = load_run(folder)
    corpus = load_corpus(run.config.data.corpus, data_dir)
    valid, test = run.evaluate(corpus, "valid"), run.evaluate(corpus, "test")
    model = json.loads(run.folder.summary.read_text(encoding="utf-8"))["model"]
    metrics = read_metrics(run.folder.metrics)
    last = [row for row in metrics if "forward/residual" in row][-10:]
    return {
        "parameters": sum(parameter.numel() for parameter in run.model().parameters()),
        "training_tokens": model["tokens"],
        "steps": model["steps"],
        "valid_perplexity": math.exp(valid.nll),
        "test_perplexity": math.exp(test.nll),
        "minutes": model["train_seconds"] / 60,
        "forward_evaluations": model["forward_evaluations"],
        "backward_evaluations": model["backward_evaluations"],
        "final_training_residual": sum(row["forward/residual"] for row in last) / len(last) if last else None,
        "test_evaluations": test.evaluations,
        "test_residual": test.residual,
        "test_unconverged": test.unconverged,
        "peak_memory_mib": model["peak_memory_bytes"] / 2**20,
    }


def check(rows: dict[str, dict[str, Any]]) -> None:
    """The comparison is fair, or there is none."""
    for key in ("parameters", "training_tokens", "steps"):
        values = {name: row[key] for name, row in rows.items()}
        if len(set(values.values())) != 1:
            raise SystemExit(f"the runs differ in {key}: {values}")


if __name__ == "__main__":
    torch.set_num_threads(2)
    main(tyro.cli(Options, description=__doc__))
