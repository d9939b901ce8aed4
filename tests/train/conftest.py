"""The text and the trainers of these tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import CONFIG, Make, small_corpus

from equilibria.data import Corpus
from equilibria.recipes.build import build_model
from equilibria.train.config import RunConfig
from equilibria.train.interrupt import StopRequest
from equilibria.train.loop import Trainer
from equilibria.train.run_folder import RunFolder


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return small_corpus()


@pytest.fixture
def make(corpus: Corpus, tmp_path: Path) -> Make:
    """Builds the trainer of a run in a folder below the test's own, resuming if that holds a checkpoint."""

    def build(config: RunConfig = CONFIG, name: str = "run", **options: Any) -> Trainer:
        folder = RunFolder(tmp_path / name)
        torch.manual_seed(config.seed)
        model = build_model(config, corpus.tokenizer.size)
        options.setdefault("stop", StopRequest())
        trainer = Trainer(model, options.pop("corpus", corpus), config, folder, **options)
        folder.store_config(config)
        return trainer

    return build
