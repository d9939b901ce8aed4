"""Copy memory with a delay of 400: the DEQ-Transformer of 14 thousand parameters beside its explicit twin.

The same sequences, parameters, steps and seed for both; the command trains them two at a time, one thread each.

    python benchmarks/copy_memory.py [--runs runs] [--collect]
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from harness import save
from runs import Run, check_fair, describe, train

TARGET, TWIN_DEPTH = 1e-5, 2


@dataclass(frozen=True, kw_only=True)
class Options:
    """Train and compare."""

    runs: Path = Path("runs")
    """Where the runs are, or go."""
    collect: bool = False
    """Train nothing; evaluate the runs that are there."""


def main(options: Options) -> None:
    pair = {"DEQ": Run(recipe="copy-memory"), "twin": Run(recipe="copy-memory").twin(TWIN_DEPTH)}
    if not options.collect:
        train(list(pair.values()), options.runs, {})
    rows = {name: describe(run, options.runs, None) for name, run in pair.items()}
    check_fair(rows)
    for name, row in rows.items():
        verdict = "reaches" if row["test_loss"] <= TARGET else "misses"
        print(f"{name:6}test loss {row['test_loss']:.2e} {verdict} {TARGET:g}, {row['minutes']:.1f} min, {row['command']}")
    save("copy_memory", {"target": TARGET, "twin_depth": TWIN_DEPTH, "rows": rows})


if __name__ == "__main__":
    torch.set_num_threads(2)
    main(tyro.cli(Options, description=__doc__))
