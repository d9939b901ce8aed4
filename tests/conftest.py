"""Fixtures and settings that the tests of every part share."""

from __future__ import annotations

import os
from pathlib import Path

import hypothesis
import pytest
import torch
from generated import generated_text

# Before any fork: the tokenizers library warns when a process forks after it has used its threads.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# The tests' tensors are small, so that threads cost more than they save and make the order of sums depend on them.
torch.set_num_threads(1)
# A machine that is busy is slow, not wrong.
hypothesis.settings.register_profile("equilibria", deadline=None)
hypothesis.settings.load_profile("equilibria")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and recordings beside the checkout; skips the test where there is none."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip(f"neither data sets nor recordings are in {folder}")
    return folder


@pytest.fixture(scope="session")
def shared_data(shared: Path) -> Path:
    """Real data sets."""
    return shared / "data"


@pytest.fixture(scope="session")
def shared_golden(shared: Path) -> Path:
    """Recordings of the original system."""
    return shared / "golden"


@pytest.fixture
def tiny_corpus_dir(tmp_path: Path) -> Path:
    """A folder of the test's own with train.txt (8 KB), valid.txt and test.txt (2 KB each): generated, always the same.

    The three are different stretches of one language, in which the subject of a sentence decides its verb and a
    paragraph keeps to one place, so that a model has something to learn within and across sentences.
    """
    folder = tmp_path / "tiny-corpus"
    folder.mkdir()
    for seed, (name, size) in enumerate({"train": 8000, "valid": 2000, "test": 2000}.items()):
        (folder / f"{name}.txt").write_text(generated_text(seed, size), encoding="utf-8", newline="\n")
    return folder
