"""Vocabularies and batches of the original code, from the recorded cases."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from equilibria.data import ORIGINAL_STYLES, Corpus, OrderedBatches, VariableLengthBatches, Vocabulary, word_corpus

STYLES = {"wt103": "wikitext-103", "wt2": "wikitext-2", "ptb": "penn-treebank", "text8": "text8", "enwik8": "enwik8"}


@pytest.fixture(params=["in memory", "in the cache"])
def large(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setenv("EQUILIBRIA_CACHE", str(tmp_path / "cache"))
    return 0 if request.param == "in the cache" else 1 << 20


def cases(golden: Path) -> list[dict[str, Any]]:
    folders = sorted(golden.glob("component_vocabulary_batching*"))
    assert folders
    return [json.loads((folder / "config.json").read_text(encoding="utf-8")) for folder in folders]


def test_vocabularies_and_iterators_are_the_recorded_ones(shared_golden: Path, tmp_path: Path, large: int) -> None:
    for case in cases(shared_golden):
        paths = []
        for split in ("train", "valid", "test"):
            paths.append(tmp_path / f"{split}.txt")
            paths[-1].write_text(case["text"][split], encoding="utf-8", newline="\n")
        for name, recorded in case["corpora"].items():
            corpus = word_corpus(name, paths, ORIGINAL_STYLES[STYLES[name]], large=large)
            assert isinstance(corpus.tokenizer, Vocabulary)
            assert corpus.tokenizer.words == recorded["idx2sym"]
            for split in ("train", "valid", "test"):
                assert getattr(corpus, split).tokens.tolist() == recorded[split]
            for iterator in recorded["iterators"]:
                check_iterator(corpus, iterator)


def check_iterator(corpus: Corpus, recorded: dict[str, Any]) -> None:
    extended = recorded["ext_len"] or 0
    batches = getattr(corpus, recorded["split"]).batches(recorded["bsz"], recorded["bptt"], extended_context=extended)
    assert isinstance(batches, OrderedBatches)
    assert batches.lanes.shape == (recorded["bsz"], recorded["n_step"])
    for (inputs, targets), batch in zip(batches, recorded["batches"], strict=True):
        assert inputs.T.tolist() == batch["data"]  # recorded as (length, batch)
        assert targets.T.tolist() == batch["target"]
        assert targets.shape[1] == batch["seq_len"]


def test_segments_of_variable_length_are_the_recorded_ones(shared_golden: Path) -> None:
    for case in cases(shared_golden):
        recorded = case["varlen"]
        batches = VariableLengthBatches(torch.arange(400), 2, 20, seed=recorded["seed"], drop_single=True)
        assert [inputs.shape[1] for inputs, _ in batches] == recorded["seq_lens"]
