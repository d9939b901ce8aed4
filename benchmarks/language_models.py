"""DEQ-Transformer and DEQ-TrellisNet against their explicit twins on Penn Treebank and WikiText-2.

Equal parameters, tokens, recipe and seed. The models are trained two at a time, one thread each, by the very commands that
are printed; runs that are already complete are kept. Then all are evaluated on the whole validation and test splits.

    python benchmarks/language_models.py --data-dir DIR [--runs runs] [--collect]
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from harness import save
from runs import Run, check_fair, describe, train

RECIPES = {
    "penn-treebank-transformer": "penn-treebank",
    "penn-treebank-trellisnet-small": "penn-treebank",
    "wikitext-2-transformer": "wikitext-2",
    "wikitext-2-trellisnet": "wikitext-2",
}
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
    data_dirs = {recipe: options.data_dir / corpus for recipe, corpus in RECIPES.items()}
    pairs = {recipe: {"DEQ": Run(recipe=recipe), "twin": Run(recipe=recipe).twin(TWIN_DEPTH)} for recipe in RECIPES}
    if not options.collect:
        train([run for pair in pairs.values() for run in pair.values()], options.runs, data_dirs)
    rows: dict[str, dict[str, Any]] = {}
    for recipe, pair in pairs.items():
        rows[recipe] = {name: describe(run, options.runs, data_dirs[recipe]) for name, run in pair.items()}
        check_fair(rows[recipe])
        for name, row in rows[recipe].items():
            row |= {"valid_perplexity": math.exp(row["valid_loss"]), "test_perplexity": math.exp(row["test_loss"])}
            print(f"{recipe:32}{name:6}" + "  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    save("language_models", {"twin_depth": TWIN_DEPTH, "recipes": rows})


if __name__ == "__main__":
    torch.set_num_threads(2)
    main(tyro.cli(Options, description=__doc__))
