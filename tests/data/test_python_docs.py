from __future__ import annotations

import hashlib
import inspect
import json
import math
import os
import subprocess
import sys
import sysconfig
import textwrap
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from equilibria.data import Texts, python_docs_texts
from equilibria.data.corpora import python_docs
from equilibria.data.python_docs import BETWEEN, TELLING, _docstrings, _groups, _reference
from equilibria.solution import UserError


@pytest.fixture(scope="module")
def texts() -> Texts:
    return python_docs_texts()


def documents(text: str) -> list[str]:
    return text.removesuffix("\n").split(BETWEEN)


def telling_lines(text: str) -> set[str]:
    return {line.strip() for line in text.split("\n") if len(line.strip()) >= TELLING}


def test_the_shares_of_the_splits(texts: Texts) -> None:
    train, valid, test = (len(text.encode()) for text in texts)
    total = train + valid + test
    assert total > 1_500_000
    assert 0.045 < valid / total < 0.055
    assert 0.045 < test / total < 0.055


def test_no_held_out_document_is_in_another_split(texts: Texts) -> None:
    assert not any(document in texts.train for document in documents(texts.valid))
    assert not any(document in texts.train or document in texts.valid for document in documents(texts.test))


def test_no_telling_line_is_in_two_splits(texts: Texts) -> None:
    train, valid, test = map(telling_lines, texts)
    assert len(test) > 500
    assert not train & valid
    assert not train & test
    assert not valid & test


def test_docstrings_are_whole_and_in_one_split(texts: Texts) -> None:
    for definition in (json, json.dumps, textwrap.TextWrapper, inspect.signature, Counter.most_common):
        docstring = inspect.getdoc(definition)
        assert docstring is not None
        assert sum(docstring.strip() in text for text in texts) == 1


def test_the_splits_are_of_one_distribution(texts: Texts) -> None:
    """Under the frequencies of pairs of characters in train, each split has nearly the same bits per character."""
    pairs, singles = Counter(pairwise(texts.train)), Counter(texts.train)

    def bits(text: str) -> float:
        return sum(-math.log2((pairs[a, b] + 0.01) / (singles[a] + 1)) for a, b in pairwise(text)) / len(text)

    train, valid, test = map(bits, texts)
    assert abs(valid / train - 1) < 0.05
    assert abs(test / train - 1) < 0.05


def test_the_text_depends_on_the_installation_alone(texts: Texts, tmp_path: Path) -> None:
    """Another process, with other hashes of strings, another folder and no docstrings, has the same text."""
    program = (
        "import hashlib; from equilibria.data import python_docs_texts; "
        "print(hashlib.sha256(repr(tuple(python_docs_texts())).encode()).hexdigest())"
    )
    package = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(package)}
    result = subprocess.run(
        [sys.executable, "-OO", "-c", program], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == hashlib.sha256(repr(tuple(texts)).encode()).hexdigest()


def test_the_corpus_codes_the_text_without_loss(texts: Texts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("equilibria.data.corpora.python_docs_texts", lambda: texts)
    corpus = python_docs(vocab_size=512)
    assert (corpus.name, corpus.tokenizer.size) == ("python-docs", 512)
    assert corpus.test_text == texts.test
    for split, text in zip([corpus.train, corpus.valid, corpus.test], texts, strict=True):
        assert corpus.tokenizer.decode(split.tokens.tolist()) == text
        assert split.text_bytes == len(text.encode())


def test_docstrings_are_read_wherever_they_stand(tmp_path: Path) -> None:
    source = '''
        r"""A module, with an \\escape that is none."""
        if True:
            class C:
                """
                A class.

                    Indented.
                """
                def f(self):
                    "A method."
                    try:
                        async def g(): "A coroutine within."
                    except E:
                        def h(): "In a handler."
        def nothing(): pass
        def surrogate(): "\\ud800"
        def empty(): "  "
        x = lambda: "not a docstring"
    '''
    good, bad = tmp_path / "good.py", tmp_path / "bad.py"
    good.write_text(textwrap.dedent(source))
    bad.write_text("def $name(): pass")
    expected = ["A module, with an \\escape that is none.", "A class.\n\n    Indented.", "A method."]
    assert sorted(_docstrings([good, bad])) == sorted([*expected, "A coroutine within.", "In a handler."])


def test_the_reference_is_cut_between_paragraphs() -> None:
    from pydoc_data.topics import topics

    sections = list(_reference())
    assert sum(map(len, sections)) > 0.98 * sum(map(len, topics.values()))
    assert all(any(section in topic for topic in topics.values()) for section in sections)
    assert sorted(map(len, sections))[len(sections) // 2] < 5000


def test_documents_that_share_a_telling_line_are_grouped() -> None:
    a, b, short = "a" * TELLING, "b" * TELLING, "c" * (TELLING - 1)
    alone, chain = f"x\n{short}", [f"1\n{a}", f"2\n  {a}\n{b}", f"3\n{b}"]
    assert sorted(map(sorted, _groups([*chain, alone, short]))) == sorted([[alone], chain, [short]])


def test_an_installation_without_source_is_the_users_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(UserError, match="no source of its standard library"):
        python_docs_texts()
