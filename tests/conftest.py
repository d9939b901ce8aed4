"""Fixtures and settings that the tests of every part share."""

from __future__ import annotations

import os
import random
from pathlib import Path

import hypothesis
import pytest
import torch

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


def generated_text(seed: int, size: int) -> str:
    """About `size` characters of paragraphs, one sentence a line and an empty line after each paragraph."""
    draw = random.Random(seed)
    verbs = {"cat": "sleeps", "dog": "barks", "bird": "sings", "child": "laughs", "river": "flows", "Zoë": "reads"}
    qualities = ["old", "small", "quiet", "happy", "grey"]
    text = ""
    while len(text) < size:
        place = draw.choice(["the garden", "the kitchen", "the village", "the harbour"])
        text += f"In {place}.\n"
        for _ in range(draw.randint(2, 6)):
            subject = draw.choice(list(verbs))
            text += f"The {draw.choice(qualities)} {subject} {verbs[subject]} in {place}.\n"
        text += "\n"
    return text
