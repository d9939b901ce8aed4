"""Words of files as numbers, in one pass over the text and in little memory, whatever its size."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np

from equilibria.data.vocabulary import EOS, Vocabulary
from equilibria.solution import UserError

CHUNK = 1 << 22  # bytes of text, or ids, that are in memory at a time; a chunk's words take some twenty times as much
IDS = np.dtype("<i4")  # how ids stand in files

Advance = Callable[[int], object]
"""Is told how many bytes more of a text are done."""


@dataclass(frozen=True, kw_only=True)
class WordStyle:
    """What the words of a corpus are, and which of its splits decide their order."""

    counted: Literal["train", "all"] = "train"
    """Splits in which words are counted and first met. With 'train', a word that train lacks is an error."""
    lower_case: bool = False
    """Whether case is folded."""
    end_of_line: bool = True
    """Whether every line, an empty one too, ends with `<eos>`."""

    def __post_init__(self) -> None:
        if self.counted not in ("train", "all"):
            raise ValueError(f"WordStyle(counted={self.counted!r}): counted must be 'train' or 'all'")


ORIGINAL_STYLES = {
    "wikitext-103": WordStyle(),
    "wikitext-2": WordStyle(counted="all"),
    "penn-treebank": WordStyle(counted="all", lower_case=True),
    "enwik8": WordStyle(counted="all", lower_case=True, end_of_line=False),
    "text8": WordStyle(counted="all", lower_case=True, end_of_line=False),
}
"""How the original DEQ code reads each corpus, which is how Transformer-XL does. Only WikiText-103 counts train alone."""


class _FirstMet(dict[str, int]):
    """Gives each new word the next number."""

    def __missing__(self, word: str) -> int:
        self[word] = number = len(self)
        return number


def number_words(
    paths: Sequence[Path], style: WordStyle, outs: Sequence[BinaryIO], advance: Advance = lambda size: None
) -> Vocabulary:
    """Writes the ids of the words of three files, train first, as little-endian int32, and returns their vocabulary.

    Words are numbered as they are first met, counted, and then renumbered: `<eos>` first, then by descending count,
    those of equal count in the order of their first appearance. That is `Vocabulary.build`, in one pass over the text.
    `outs` are empty files opened to be read and written; `advance` is told what was read. Raises UserError for a text
    that is empty or not UTF-8 and for a word that was not counted.
    """
    met = _FirstMet()
    counts = np.zeros(0, np.int64)
    if style.end_of_line:
        met[EOS] = 0
    for path, out in zip(paths, outs, strict=True):
        counting = style.counted == "all" or path is paths[0]
        # Without the method that numbers new words, a new word is a KeyError.
        number = met.__getitem__ if counting else dict(met).__getitem__
        for words in _words(path, style, advance):
            ids = _numbers(words, number, path)
            out.write(ids.tobytes())
            if counting:
                counts = _add(counts, np.bincount(ids, minlength=len(met)))
    # A stable sort keeps words of equal count in the order in which they were met.
    rank = -_add(counts, np.zeros(len(met), np.int64))
    if style.end_of_line:
        rank[0] = np.iinfo(np.int64).min
    order = np.argsort(rank, kind="stable")
    new = np.empty(len(met), IDS)
    new[order] = np.arange(len(met), dtype=IDS)
    for out in outs:
        _renumber(out, new)
    words = list(met)
    return Vocabulary([words[i] for i in order], end_of_line=style.end_of_line, lower_case=style.lower_case)


def text_chunks(path: Path, size: int = CHUNK, *, advance: Advance = lambda size: None) -> Iterator[str]:
    """A file as pieces of whole lines, of about `size` bytes. Raises UserError if it is not UTF-8 or has no words."""
    empty, lines = True, 0
    with path.open("rb") as file:
        while raw := file.read(size):
            if not raw.endswith(b"\n"):
                raw += file.readline()
            try:
                text = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                number = lines + raw.count(b"\n", 0, error.start) + 1
                raise UserError(f"line {number} of {path} is not UTF-8; save the file in that encoding") from None
            lines += raw.count(b"\n")
            empty = empty and not text.strip()
            yield text
            advance(len(raw))
    if empty:
        raise UserError(f"{path} is empty; put text into it")


def in_memory() -> list[BinaryIO]:
    """Three empty files for `number_words` that are nowhere stored."""
    return [io.BytesIO() for _ in range(3)]


def _words(path: Path, style: WordStyle, advance: Advance) -> Iterator[list[str]]:
    for text in text_chunks(path, advance=advance):
        if style.lower_case:
            text = text.lower()
        if style.end_of_line:
            if not text.endswith("\n"):  # the last line of a file needs no newline
                text += "\n"
            text = text.replace("\n", f" {EOS} ")
        yield text.split()


def _numbers(words: list[str], number: Callable[[str], int], path: Path) -> np.ndarray:
    try:
        return np.fromiter(map(number, words), IDS, len(words))
    except KeyError as error:
        raise UserError(
            f"the word {error.args[0]!r} of {path} is not among the words of the train split; leave the word out, "
            "or give a train split that has it"
        ) from None


def _add(counts: np.ndarray, more: np.ndarray) -> np.ndarray:
    """The sum, where the second has as many words as the first or more."""
    total = more.astype(np.int64)
    total[: len(counts)] += counts
    return total


def _renumber(file: BinaryIO, new: np.ndarray) -> None:
    position = 0
    while True:
        file.seek(position)
        if not (raw := file.read(CHUNK)):
            return
        file.seek(position)
        position += file.write(new[np.frombuffer(raw, IDS)].tobytes())
