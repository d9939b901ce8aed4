"""Runs that train in seconds, and what they leave."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import torch

from equilibria.data import BytePair, Corpus, Split
from equilibria.train.checkpoint import load_tensors
from equilibria.train.config import DataConfig, OptimConfig, RunConfig, SolveConfig, TransformerModel
from equilibria.train.loop import Trainer
from equilibria.train.run_folder import read_metrics

Make = Callable[..., Trainer]

CONFIG = RunConfig(
    recipe="text",
    model=TransformerModel(d_model=8, n_head=2, d_inner=16, mem_len=6, dropout=0.1),
    solver=SolveConfig(max_evals=5, backward_max_evals=4),
    data=DataConfig(corpus="text"),
    # 14 steps of 5 tokens in each of 3 lanes pass the end of the 160-token text once
    optim=OptimConfig(lr=1e-2, warmup_steps=3, steps=14, batch_size=3, length=5, pretrain_steps=3, pretrain_depth=2),
    eval_every=4,
    log_every=1,
    eval_batch_size=2,
)


CIRCUMSTANCES = ("seconds", "step", "train/tokens_per_second", "train/memory_bytes")


def small_corpus() -> Corpus:
    """A generated text of 320 tokens."""
    draw = random.Random(0)
    text = "".join(draw.choice("abcd ") for _ in range(400))
    tokenizer = BytePair.train(text, 256)

    def split(begin: int, end: int) -> Split:
        return Split(torch.tensor(tokenizer.encode(text[begin:end])), end - begin)

    return Corpus("text", split(0, 160), split(160, 240), split(240, 320), tokenizer, text[240:320])


def with_optim(**changes: Any) -> RunConfig:
    return dataclasses.replace(CONFIG, optim=dataclasses.replace(CONFIG.optim, **changes))


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return trainer.folder.checkpoints.newest(lambda folder: load_tensors(folder, "model"))


def losses(trainer: Trainer) -> dict[int, tuple[float, ...]]:
    """Everything in the metrics that depends neither on the clock nor on what else the process holds."""
    found: dict[int, tuple[float, ...]] = {}
    for row in read_metrics(trainer.folder.metrics):
        values = (value for key, value in sorted(row.items()) if key not in CIRCUMSTANCES)
        found[row["step"]] = found.get(row["step"], ()) + tuple(values)
    return found
