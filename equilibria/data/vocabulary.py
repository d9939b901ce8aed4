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

    `words[i]` is the word of id i. `<eos>` stands for the end of a line and is always a word. Case is kept.
    A word outside the vocabulary becomes `<unk>` where that is a word of it, and is an error where it is not.

        Vocabulary.build(["a b a", ""]).encode("b a\\n")   # [2, 1, 0]
    """

    kind = "words"

    def __init__(self, words: Sequence[str]) -> None:
        self.words = list(words)
        self._ids = {word: i for i, word in enumerate(self.words)}
        if len(self._ids) != len(self.words):
            twice = next(word for word, count in Counter(self.words).items() if count > 1)
            raise ValueError(f"words holds {twice!r} more than once; give each word once")
        if EOS not in self._ids:
            raise ValueError(f"words lacks {EOS!r}, the end of a line; put it first")
        self._unk = self._ids.get(UNK)

    @classmethod
    def build(cls, lines: Iterable[str], specials: Sequence[str] = (EOS,)) -> Vocabulary:
        """Vocabulary of the words in `lines`.

        The specials come first, then the words by descending count; words of equal count stand in the order of their
        first appearance. An adaptive softmax relies on that order, and so does a checkpoint of Transformer-XL or of the
        original DEQ, which order the words of WikiText-103's training split in this way.
        """
        counts: Counter[str] = Counter()
        for line in lines:
            counts.update(line.split())
        for special in specials:
            counts.pop(special, None)
        return cls([*specials, *(word for word, _ in counts.most_common())])

    @property
    def size(self) -> int:
        """Number of words, `<eos>` included."""
        return len(self.words)

    def encode(self, text: str) -> list[int]:
        """Ids of the words of `text`, with `<eos>` for each newline, so that a prompt may end within a line.

        Raises UserError for a word outside a vocabulary that has no `<unk>`.
        """
        *lines, rest = text.split("\n")
        return self._encode(lines, rest).tolist()

    def encode_lines(self, lines: Iterable[str]) -> Tensor:
        """(N,) int64 ids of the words of `lines`, with `<eos>` after every line, an empty one too.

        Reads one line at a time, so that a file larger than memory may stream through it. Raises as `encode` does.
        """
        ids = self._encode(lines, "")
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
            if word == EOS:
                pieces.append("\n")
            else:
                pieces.append(word if start_of_line else f" {word}")
            start_of_line = word == EOS
        return "".join(pieces)

    def save(self, folder: Path) -> None:
        """Writes `folder`/tokenizer.json, which `load_tokenizer` reads."""
        document = {"kind": self.kind, "words": self.words}
        (folder / "tokenizer.json").write_text(json.dumps(document, ensure_ascii=False, indent=0), encoding="utf-8")

    @classmethod
    def from_document(cls, document: dict[str, Any]) -> Vocabulary:
        """The vocabulary that `save` wrote, from its parsed JSON. Raises ValueError if it is not one."""
        words = document.get("words")
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise ValueError("'words' is not a list of strings")
        return cls(words)

    def _encode(self, lines: Iterable[str], rest: str) -> array[int]:
        ids = array("q")
        eos = self._ids[EOS]
        try:
            for line in lines:
                ids.extend(self._look_up(line))
                ids.append(eos)
            ids.extend(self._look_up(rest))
        except KeyError as error:
            raise UserError(
                f"the word {error.args[0]!r} is not among the {self.size:,} words of the vocabulary, "
                f"which has no {UNK}; leave the word out, or build the vocabulary on a text that has it"
            ) from None
        return ids

    def _look_up(self, line: str) -> Iterable[int]:
        if self._unk is None:
            return map(self._ids.__getitem__, line.split())
        return map(self._ids.get, line.split(), repeat(self._unk))
