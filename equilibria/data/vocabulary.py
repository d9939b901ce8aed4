"""Words as tokens: the vocabulary of WikiText and of the Penn Treebank."""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from equilibria.solution import UserError

EOS = "<eos>"
UNK = "<unk>"


class Vocabulary:
    """Maps the words of a text, which are what whitespace separates, to the ids 0 .. size - 1 and back.

    `words[i]` is the word of id i. With `end_of_line`, `<eos>` stands for the end of a line and is a word; without, a
    newline is white space as any other. With `lower_case`, case is folded before a word is looked up. In `encode`,
    which is for prompts, a word outside the vocabulary becomes `<unk>` where that is a word of it; in `encode_lines`,
    which is for corpora, it is an error always: a split that has such words was not made for this vocabulary.

    >>> Vocabulary.build(["a b a", ""]).encode("b a\\n")
    [2, 1, 0]
    """

    kind = "words"

    def __init__(self, words: Sequence[str], *, end_of_line: bool = True, lower_case: bool = False) -> None:
        self.words = list(words)
        self.end_of_line = end_of_line
        self.lower_case = lower_case
        self._ids = {word: i for i, word in enumerate(self.words)}
        if len(self._ids) != len(self.words):
            twice = next(word for word, count in Counter(self.words).items() if count > 1)
            raise ValueError(f"words holds {twice!r} more than once; give each word once")
        if end_of_line and EOS not in self._ids:
            raise ValueError(f"words lacks {EOS!r}, the end of a line; put it first, or set end_of_line=False")
        self._eos = [self._ids[EOS]] if end_of_line else []
        self._unk = self._ids.get(UNK)

    @classmethod
    def build(
        cls,
        lines: Iterable[str],
        specials: Sequence[str] | None = None,
        *,
        end_of_line: bool = True,
        lower_case: bool = False,
    ) -> Vocabulary:
        """Vocabulary of the words in `lines`.

        The specials (by default `<eos>`, if lines end with it) come first, then the words by descending count; words
        of equal count stand in the order of their first appearance. An adaptive softmax relies on that order, and so
        does a checkpoint of Transformer-XL or of the original DEQ, which order the words of WikiText-103's training
        split in this way.
        """
        if specials is None:
            specials = (EOS,) if end_of_line else ()
        counts: Counter[str] = Counter()
        for line in lines:
            counts.update((line.lower() if lower_case else line).split())
        for special in specials:
            counts.pop(special, None)
        words = [*specials, *(word for word, _ in counts.most_common())]
        return cls(words, end_of_line=end_of_line, lower_case=lower_case)

    @property
    def size(self) -> int:
        """Number of words, `<eos>` included."""
        return len(self.words)

    def encode(self, text: str) -> list[int]:
        """Ids of the words of `text`, with `<eos>` for each newline, so that a prompt may end within a line.

        A word outside the vocabulary becomes `<unk>`; where there is none, UserError is raised.
        """
        *lines, rest = text.split("\n")
        ids = array("q")
        for line in lines:
            self._look_up(line, ids, self._unk)
            ids.extend(self._eos)
        self._look_up(rest, ids, self._unk)
        return ids.tolist()

    def encode_lines(self, lines: Iterable[str]) -> Tensor:
        """(N,) int64 ids of the words of `lines`, with `<eos>` after every line, an empty one too.

        Reads one line at a time, so that a file larger than memory may stream through it. Raises UserError for a word
        outside the vocabulary, also where there is an `<unk>`.
        """
        ids = array("q")
        for line in lines:
            self._look_up(line, ids, None)
            ids.extend(self._eos)
        return torch.frombuffer(ids, dtype=torch.int64) if ids else torch.empty(0, dtype=torch.int64)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`: words one space apart, and a newline for each `<eos>`.

        Gives back what `encode` was given up to white space within lines, and up to words that were unknown.
        """
        pieces: list[str] = []
        start_of_line = True
        for i in ids:
            if not 0 <= i < self.size:
                raise ValueError(f"id {int(i)} is outside the vocabulary; ids are 0 to {self.size - 1}")
            word = self.words[i]
            ends = self.end_of_line and word == EOS
            if ends:
                pieces.append("\n")
            else:
                pieces.append(word if start_of_line else f" {word}")
            start_of_line = ends
        return "".join(pieces)

    def save(self, folder: Path) -> None:
        """Writes `folder`/tokenizer.json, which `load_tokenizer` reads."""
        document = {
            "kind": self.kind,
            "end_of_line": self.end_of_line,
            "lower_case": self.lower_case,
            "words": self.words,
        }
        (folder / "tokenizer.json").write_text(json.dumps(document, ensure_ascii=False, indent=0), encoding="utf-8")

    @classmethod
    def from_document(cls, document: dict[str, Any]) -> Vocabulary:
        """The vocabulary that `save` wrote, from its parsed JSON. Raises ValueError if it is not one."""
        words = document.get("words")
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise ValueError("'words' is not a list of strings")
        end_of_line, lower_case = document.get("end_of_line", True), document.get("lower_case", False)
        if not isinstance(end_of_line, bool) or not isinstance(lower_case, bool):
            raise ValueError("'end_of_line' and 'lower_case' are not both true or false")
        return cls(words, end_of_line=end_of_line, lower_case=lower_case)

    def _look_up(self, line: str, ids: array[int], unknown: int | None) -> None:
        """Appends the ids of the words of a line; `unknown` is the id of a word outside, None to refuse it."""
        words = (line.lower() if self.lower_case else line).split()
        if unknown is not None:
            ids.extend(map(self._ids.get, words, repeat(unknown)))
            return
        try:
            ids.extend(map(self._ids.__getitem__, words))
        except KeyError as error:
            raise UserError(
                f"the word {error.args[0]!r} is not among the {self.size:,} words of the vocabulary; "
                "leave the word out, or build the vocabulary on a text that has it"
            ) from None
