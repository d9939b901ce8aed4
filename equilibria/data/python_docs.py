"""A text that is at hand wherever Python is: the documentation that CPython carries within itself.

It is made of the language reference behind Python's `help()` (the module `pydoc_data.topics`) and of the docstrings in
the source of the standard library: about 2 MB of English and code. It depends on the Python installation alone.
"""

from __future__ import annotations

import ast
import gc
import hashlib
import os
import sysconfig
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from equilibria.solution import UserError

INSTALLED = {"__pycache__", "dist-packages", "site-packages"}  # folders that are not the standard library's own
SKIPPED = {"encodings", "idlelib", "lib2to3", "pydoc_data", "test", "tests", "turtledemo"} | INSTALLED
SECTION = 2000  # characters; the topics of the reference are cut into sections of about this size
TELLING = 40  # characters; two documents that share a line as long as this are taken to repeat one another
HELD_OUT = 0.05  # the share of the text that valid has, and test
LARGEST = 0.005  # a group of documents with a larger share of the text is not held out: it would be most of a split
BETWEEN = "\n\n\n"  # between documents; most have blank lines within, few have two together


class Texts(NamedTuple):
    """The three splits of a text."""

    train: str
    valid: str
    test: str


def python_docs_texts() -> Texts:
    """The documentation that this Python carries: about 90 % of it as train, 5 % as valid and 5 % as test text.

    A split is a list of whole documents, two blank lines apart, in the order of their hashes, so that the three are of
    one distribution. No line of 40 or more characters stands in two splits, no document of valid occurs anywhere in
    train, and none of test anywhere in train or valid.

    Raises UserError where the installation has no source of the standard library.

        python_docs_texts().test[:70]
    """
    documents = sorted({*_docstrings(_standard_library()), *_reference()})
    limit = HELD_OUT * sum(map(len, documents))
    largest = LARGEST * sum(map(len, documents))
    train: list[str] = []
    valid: list[str] = []
    test: list[str] = []
    held_out = {"test": 0, "valid": 0}  # characters
    for group in sorted(_groups(documents), key=lambda group: _hash(group[0])):
        size = sum(map(len, group))
        if size <= largest and held_out["test"] + size <= limit:
            test += group
            held_out["test"] += size
        elif size <= largest and held_out["valid"] + size <= limit:
            valid += group
            held_out["valid"] += size
        else:
            train += group
    # What is left to remove are short documents, such as "Return the name.", that are part of a longer one.
    train_text = _join(train)
    valid_text = _join([document for document in valid if document not in train_text])
    test_text = _join([document for document in test if document not in train_text and document not in valid_text])
    return Texts(train_text, valid_text, test_text)


def _standard_library() -> list[Path]:
    folder = sysconfig.get_path("stdlib")
    paths: list[Path] = []
    for parent, folders, names in os.walk(folder):
        folders[:] = (name for name in folders if name not in SKIPPED)
        paths += (Path(parent, name) for name in names if name.endswith(".py"))
    if not paths:
        raise UserError(
            f"this Python has no source of its standard library in {folder}; use another installation of Python, "
            "or train on a text of your own"
        )
    return paths


def _docstrings(paths: list[Path]) -> list[str]:
    """Docstrings in source files, read and not imported: an import may do anything, and -OO would strip them."""
    docstrings: list[str] = []
    with warnings.catch_warnings(), _without_collection():
        warnings.simplefilter("ignore")  # of old escapes and comparisons in the source
        for path in paths:
            try:
                module = ast.parse(path.read_bytes())
            except (SyntaxError, ValueError):
                continue  # a template of a program, not a program
            docstrings += filter(None, map(ast.get_docstring, _definitions(module)))
    return [docstring.strip() for docstring in docstrings if _is_text(docstring)]


@contextmanager
def _without_collection() -> Iterator[None]:
    """Leaves cyclic garbage alone: syntax trees have none, and looking for it takes most of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _definitions(module: ast.Module) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    # Descends into statements alone: expressions are most of a tree and define nothing that has a docstring.
    nodes: list[ast.AST] = [module]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
        for field in ("body", "orelse", "handlers", "finalbody", "cases"):
            nodes += getattr(node, field, ())


def _reference() -> Iterator[str]:
    """Sections of the language reference: a whole topic may be 60 KB long, more than half of a held-out split."""
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions package it apart; the docstrings alone are a text
        return
    for topic in topics.values():
        section: list[str] = []
        for paragraph in topic.strip().split("\n\n"):
            section.append(paragraph)
            if sum(map(len, section)) >= SECTION:
                yield "\n\n".join(section).strip()
                section = []
        if section:
            yield "\n\n".join(section).strip()


def _is_text(document: str) -> bool:
    """Whether it is Unicode text; a docstring about surrogates may hold one."""
    try:
        document.encode()
    except UnicodeEncodeError:
        return False
    return bool(document.strip())


def _groups(documents: list[str]) -> list[list[str]]:
    """The finest grouping in which documents that share a telling line are in one group, each group in order."""
    parent = list(range(len(documents)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    first: dict[str, int] = {}  # the first document that has the line
    for i, document in enumerate(documents):
        for line in document.split("\n"):
            if len(line := line.strip()) >= TELLING:
                parent[root(i)] = root(first.setdefault(line, i))
    groups: dict[int, list[str]] = {}
    for i, document in enumerate(documents):
        groups.setdefault(root(i), []).append(document)
    return list(groups.values())


def _hash(document: str) -> bytes:
    return hashlib.sha256(document.encode()).digest()


def _join(documents: list[str]) -> str:
    return BETWEEN.join(documents) + "\n"
