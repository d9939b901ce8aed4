"""Where valid and test come from when a text has no files of its own for them: out of train, always in the same way."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from equilibria.data.documents import Document, LongText, is_long

MANY = 200  # short documents; fewer are not drawn, for valid might have none
PIECE = 1 << 16  # characters that are handed on at a time, for one thread to encode
LONGEST_PIECE = 1 << 20  # characters
CUT = re.compile(r"(?<=\S)[ \n]")


class Part(NamedTuple):
    """A piece of a document."""

    split: int
    """0: train, 1: valid, 2: test."""
    text: str
    begins: bool
    """Whether a document begins here, or what a split has of one."""


@dataclass(frozen=True)
class Carving:
    """What part of the train split goes to valid and to test.

    A document above 1 MiB gives each of them its end. Of shorter documents, where there are many, a hash of its text says
    where one goes, so that equal documents stay together and no other document has a say. Where there are few, they are
    one text in the order of the documents and give its end. A cut is made behind the end of a line, if there is one.
    """

    valid: float
    """0 where the text has files for it."""
    test: float
    few: int | None = None
    """Bytes of all short documents, where they are few."""

    @classmethod
    def plan(cls, documents: Iterable[Document], valid: float, test: float) -> Carving:
        """Looks whether the short documents are few."""
        if not valid and not test:
            return cls(0, 0)
        count = size = 0
        for document in documents:
            if not is_long(document) and not is_empty(document):
                assert isinstance(document, str)
                count, size = count + 1, size + len(document.encode())
            if count == MANY:
                return cls(valid, test)
        return cls(valid, test, size)

    def parts(self, documents: Iterable[Document]) -> Iterator[Part]:
        """The train split as parts of documents, with those of valid and test among them. Empty documents are left out."""
        if not self.valid and not self.test:
            for document in documents:
                yield from whole(document, 0)
            return
        together = None if self.few is None else self._cutter(self.few)
        for document in documents:
            if is_empty(document):
                continue
            if is_long(document):
                size = document.size() if isinstance(document, LongText) else len(document.encode())
                yield from self._cutter(size).parts(document)
            elif together is not None:
                yield from together.parts(document)
            else:
                assert isinstance(document, str)
                yield from whole(document, self._drawn(document))

    def _cutter(self, size: int) -> _Cutter:
        return _Cutter((round(size * (1 - self.valid - self.test)), round(size * (1 - self.test))))

    def _drawn(self, document: str) -> int:
        number = int.from_bytes(hashlib.blake2b(document.encode(), digest_size=8).digest(), "big") / 2**64
        return 2 if number < self.test else 1 if number < self.test + self.valid else 0


def whole(document: Document, split: int) -> Iterator[Part]:
    """A document that is in one split, in pieces; nothing of one that is empty."""
    if not is_empty(document):
        begins = True
        for piece in pieces(document):
            yield Part(split, piece, begins)
            begins = False


def is_empty(document: Document) -> bool:
    """Whether there is but white space."""
    return isinstance(document, str) and (not document or document.isspace())


def pieces(document: Document, size: int = PIECE, longest: int = LONGEST_PIECE) -> Iterator[str]:
    """A document in pieces of about `size` >= 1 characters, whose byte pairs together are those of the whole.

    That holds for a cut between a visible character and a space or newline. No word, as byte-level encoding knows them,
    goes on over such a place, and none depends on what lies on its other side. (Between white space and a visible
    character it would: a run of white space ends one character early where a visible character follows.) Where there is
    no such place in `longest` characters, the cut is made there all the same.
    """
    blocks = iter((document,)) if isinstance(document, str) else document.blocks()
    rest = ""
    for block in blocks:
        rest += block
        start = 0
        # A piece is handed on only when its end cannot depend on what follows: then blocks do not matter.
        while len(rest) - start > longest:
            end = _end(rest, start, size, longest)
            yield rest[start:end]
            start = end
        rest = rest[start:]
    start = 0
    while start < len(rest):
        end = _end(rest, start, size, longest)
        yield rest[start:end]
        start = end


def _end(text: str, start: int, size: int, longest: int) -> int:
    found = CUT.search(text, start + size, start + longest)
    return found.start() if found else min(start + longest, len(text))


class _Cutter:
    """Hands text on to one split after the other, as it comes to the places `bounds`, in bytes of UTF-8."""

    def __init__(self, bounds: tuple[int, int]) -> None:
        self.bounds, self.at, self.split = bounds, 0, 0

    def parts(self, document: Document) -> Iterator[Part]:
        last = None
        for piece in pieces(document):
            for split, text in self._cut(piece):
                yield Part(split, text, split != last)
                last = split

    def _cut(self, piece: str) -> Iterator[tuple[int, str]]:
        raw, start = piece.encode(), 0
        while self.split < 2 and self.bounds[self.split] < self.at + len(raw):
            end = _line_end(raw, max(start, self.bounds[self.split] - self.at))
            if end > start:
                yield self.split, raw[start:end].decode()
            start, self.split = end, self.split + 1
        if start < len(raw):
            yield self.split, raw[start:].decode()
        self.at += len(raw)


def _line_end(raw: bytes, start: int) -> int:
    """Behind the first end of a line from `start` on; without one before the next space, or at the end."""
    if (found := raw.find(b"\n", start)) >= 0:
        return found + 1
    return found if (found := raw.find(b" ", start)) >= 0 else len(raw)
