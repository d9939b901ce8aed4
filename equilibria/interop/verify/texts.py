"""Vocabularies and batches: exact."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from equilibria.data import ORIGINAL_STYLES, Corpus, OrderedBatches, VariableLengthBatches, Vocabulary, word_corpus
from equilibria.interop.verify.cases import Case
from equilibria.interop.verify.report import Report
from equilibria.interop.verify.tolerances import Limits

STYLES = {"wt103": "wikitext-103", "wt2": "wikitext-2", "ptb": "penn-treebank", "text8": "text8", "enwik8": "enwik8"}
SPLITS = ("train", "valid", "test")


def check(case: Case, dtype: torch.dtype, limits: Limits, report: Report) -> None:
    with TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{split}.txt" for split in SPLITS]
        for path, split in zip(paths, SPLITS, strict=True):
            path.write_text(case.config["text"][split], encoding="utf-8", newline="\n")
        for name, said in case.config["corpora"].items():
            corpus = word_corpus(name, paths, ORIGINAL_STYLES[STYLES[name]])
            assert isinstance(corpus.tokenizer, Vocabulary)
            report.exact(f"{name}: vocabulary", corpus.tokenizer.words == said["idx2sym"])
            for split in SPLITS:
                report.exact(f"{name}: tokens", getattr(corpus, split).tokens.tolist() == said[split], split)
            for number, iterator in enumerate(said["iterators"]):
                report.exact(f"{name}: batches", _same_batches(corpus, iterator), f"iterator {number}")
    if "varlen" in case.config:
        _check_lengths(case.config["varlen"], report)


def _same_batches(corpus: Corpus, said: Mapping[str, Any]) -> bool:
    extended = said["ext_len"] or 0
    batches = getattr(corpus, said["split"]).batches(said["bsz"], said["bptt"], extended_context=extended)
    assert isinstance(batches, OrderedBatches)
    found = [
        {"data": inputs.T.tolist(), "target": targets.T.tolist(), "seq_len": targets.shape[1]}  # (length, batch)
        for inputs, targets in batches
    ]
    # Its n_batch is no number of batches: it counts the context as text.
    return batches.lanes.shape == (said["bsz"], said["n_step"]) and found == said["batches"]


def _check_lengths(said: Mapping[str, Any], report: Report) -> None:
    """Described in words: "arange(400), bsz 2, bptt 20"."""
    numbers = re.search(r"arange\((\d+)\), bsz (\d+), bptt (\d+)", said["data"])
    if numbers is None:
        raise ValueError(f"varlen.data is {said['data']!r}; expected 'arange(N), bsz B, bptt L, ...'")
    tokens, batch_size, length = map(int, numbers.groups())
    batches = VariableLengthBatches(torch.arange(tokens), batch_size, length, seed=said["seed"], drop_single=True)
    report.exact("varlen: seq_lens", [targets.shape[1] for _, targets in batches] == said["seq_lens"])
