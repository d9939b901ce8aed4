"""Documents as tokens, in one pass over the text and in little memory, whatever its size."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
import torch
from torch import Tensor

from equilibria.data.byte_pair import END_OF_TEXT, BytePair
from equilibria.data.cache import NAMES, as_tensor, cache_folder, kept_folder, kept_tokens, progress_bar
from equilibria.data.carve import Carving, Part, whole
from equilibria.data.documents import Advance, Document
from equilibria.data.options import TextOptions
from equilibria.data.text_files import SPLITS
from equilibria.data.tokenizer import load_tokenizer
from equilibria.data.word_ids import IDS
from equilibria.solution import UserError

LARGE = 1 << 23  # bytes as they are read; below, making the tokens anew takes a second or two
FORMAT = 1  # of a folder of tokens
SAMPLE = 1 << 26  # characters that byte pairs are learnt from
GROUP = 1 << 22  # characters that are encoded at a time
SHOWN = 1 << 26  # bytes of the text of the test split that are kept, for xz -9 to see as far as it looks back
ABOUT, TEST_TEXT = "about.json", "test.txt"
BETWEEN = "\n"  # documents, in the text that xz sees

Note = Callable[[str], None]
"""Is told what happens, a line at a time."""


class Source(Protocol):
    """Where documents come from."""

    def has(self, split: int) -> bool:
        """Whether it has a split train (0), valid (1) or test (2) of its own."""
        ...

    def documents(self, split: int, advance: Advance = ...) -> Iterator[Document]:
        """The documents of a split, in the same order each time."""
        ...

    def size(self) -> int | None:
        """Bytes to read; None where nobody knows."""
        ...

    def key(self) -> object:
        """What decides the documents, as JSON."""
        ...

    def where(self, split: int) -> str:
        """Words for a split."""
        ...


@dataclass(frozen=True, kw_only=True)
class About:
    """What is known of the tokens."""

    documents: list[int]
    """In train, valid and test."""
    text_bytes: list[int]
    """Of the documents in UTF-8."""
    few: int | None = None
    """As in `Carving`."""
    learnt_from: float | None = None
    """Share of the train split that the byte pairs were learnt from; None where they were not learnt."""


@dataclass(frozen=True)
class NumberedText:
    """Three splits as tokens."""

    tokens: list[Tensor]
    tokenizer: BytePair
    about: About
    test_text: str | None
    """None where it is long."""
    folder: Path | None
    """Where it is kept, if it is."""


def numbered_text(
    source: Source,
    options: TextOptions,
    tokenizer: BytePair | None,
    vocab_size: int,
    *,
    note: Note = lambda line: None,
    large: int = LARGE,
) -> NumberedText:
    """The documents of a source as tokens, with the end of a text between one document and the next.

    `tokenizer` None learns one of `vocab_size` byte pairs, from a sample of 64 million characters where train has more. A
    source of `large` bytes and more is read once: its ids, int32, are kept in the cache under a hash of the source, the
    options and the tokenizer, and are memory-mapped. Whatever its size, some hundreds of megabytes are in memory at a time.
    """
    size = source.size()
    if size is not None and size < large:
        outs = [io.BytesIO() for _ in NAMES]
        text = io.BytesIO()
        tokenizer, about = _number(source, options, tokenizer, vocab_size, outs, text, note=lambda line: None)
        tokens = [as_tensor(out.getbuffer()).to(torch.int64) for out in outs]
        return NumberedText(tokens, tokenizer, about, _shown(text.getvalue(), about), None)

    def fill(scratch: Path) -> None:
        with contextlib.ExitStack() as stack:
            outs = [stack.enter_context((scratch / name).open("wb")) for name in NAMES]
            text = stack.enter_context((scratch / TEST_TEXT).open("wb"))
            made, about = _number(source, options, tokenizer, vocab_size, outs, text, note=note)
        made.save(scratch)
        (scratch / ABOUT).write_text(json.dumps(asdict(about)))

    key = _key(source, options, tokenizer, vocab_size)
    if not (cache_folder() / "tokens" / key).is_dir():
        note("cutting the text into tokens, once")
    folder = kept_folder("tokens", key, fill, "its tokens are made again")
    about = About(**json.loads((folder / ABOUT).read_text()))
    kept = load_tokenizer(folder)
    assert isinstance(kept, BytePair)
    return NumberedText(kept_tokens(folder), kept, about, _shown((folder / TEST_TEXT).read_bytes(), about), folder)


def _number(
    source: Source,
    options: TextOptions,
    tokenizer: BytePair | None,
    vocab_size: int,
    outs: Sequence[BinaryIO],
    text: BinaryIO,
    *,
    note: Note,
) -> tuple[BytePair, About]:
    limit = options.max_documents

    def documents(split: int, advance: Advance = lambda size: None) -> Iterator[Document]:
        return islice(source.documents(split, advance), limit)

    valid, test = (
        0.0 if source.has(split) else share for split, share in ((1, options.valid_share), (2, options.test_share))
    )
    carving = Carving.plan(documents(0), valid, test)
    learnt_from = None
    if tokenizer is None:
        with progress_bar("reading the text to learn byte pairs from", source.size()) as bar:
            sample, learnt_from = _sample(part.text for part in carving.parts(documents(0, bar.update)) if part.split == 0)
        note(f"learning {vocab_size:,} tokens from {sum(map(len, sample)):,} characters")
        try:
            tokenizer = BytePair.train(sample, vocab_size, END_OF_TEXT)
        except ValueError as error:
            raise UserError(str(error)) from None
        del sample
    with progress_bar("cutting the text into tokens, once", source.size()) as bar:
        writer = _Writer(tokenizer, outs, text)
        writer.write(carving.parts(documents(0, bar.update)))
        for split in (1, 2):
            writer.write(part for document in documents(split, bar.update) for part in whole(document, split))
    for split, tokens in enumerate(writer.tokens):
        if tokens < 2:
            raise _too_short(source, split)
    about = About(documents=writer.documents, text_bytes=writer.text_bytes, few=carving.few, learnt_from=learnt_from)
    return tokenizer, about


def _sample(texts: Iterable[str], size: int = SAMPLE) -> tuple[list[str], float]:
    """Of many texts every second, fourth, ..., so that about `size` characters are left; and their share."""
    kept: list[str] = []
    held = seen = 0
    stride = 1
    for number, text in enumerate(texts):
        seen += len(text)
        if number % stride == 0:
            kept.append(text)
            held += len(text)
        if held > size:
            stride *= 2
            kept = kept[::2]
            held = sum(map(len, kept))
    return kept, held / max(1, seen)


class _Writer:
    """Encodes parts and writes their ids."""

    def __init__(self, tokenizer: BytePair, outs: Sequence[BinaryIO], test_text: BinaryIO) -> None:
        self.tokenizer, self.outs, self.test_text = tokenizer, outs, test_text
        self.documents, self.text_bytes, self.tokens = [0, 0, 0], [0, 0, 0], [0, 0, 0]

    def write(self, parts: Iterable[Part]) -> None:
        group: list[Part] = []
        size = 0
        for part in parts:
            group.append(part)
            size += len(part.text)
            if size >= GROUP:
                self._flush(group)
                group, size = [], 0
        self._flush(group)

    def _flush(self, group: list[Part]) -> None:
        ids = [array("i") for _ in self.outs]
        for part, each in zip(group, self.tokenizer.encode_all([part.text for part in group]), strict=True):
            split = part.split
            if part.begins:
                if self.documents[split] and self.tokenizer.end_id is not None:
                    ids[split].append(self.tokenizer.end_id)
                self.documents[split] += 1
            ids[split].extend(each)
            raw = part.text.encode()
            self.text_bytes[split] += len(raw)
            if split == 2 and self.text_bytes[2] <= SHOWN:
                between = BETWEEN if part.begins and self.documents[2] > 1 else ""
                self.test_text.write(between.encode() + raw)
        for split, each in enumerate(ids):
            self.outs[split].write(np.asarray(each, IDS).tobytes())
            self.tokens[split] += len(each)


def _shown(text: bytes, about: About) -> str | None:
    return text.decode() if about.text_bytes[2] <= SHOWN else None


def _too_short(source: Source, split: int) -> UserError:
    if source.has(split):
        return UserError(f"{source.where(split)} is empty; put text into it")
    name = SPLITS[split]
    return UserError(f"{source.where(0)} has too little text for a {name} split; give more, or a larger --{name}-share")


def _key(source: Source, options: TextOptions, tokenizer: BytePair | None, vocab_size: int) -> str:
    how = [vocab_size, SAMPLE] if tokenizer is None else [tokenizer.to_json(), tokenizer.end_of_text]
    shares = [0 if source.has(1) else options.valid_share, 0 if source.has(2) else options.test_share]
    values = [FORMAT, source.key(), how, shares, options.max_documents]
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()
