"""Bytes as tokens: enwik8 and text8."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from equilibria.data.vocabulary import Vocabulary
from equilibria.solution import UserError

ALL = bytes(range(256))
PIECE = 1 << 20


class Bytes:
    """Maps the UTF-8 bytes of a text to their places in an alphabet, and back.

    With the alphabet of all 256 bytes, the default, the id of a byte is its value.

    >>> Bytes().encode("né"), Bytes(b" abc").encode("a cab")
    ([110, 195, 169], [1, 0, 3, 1, 2])
    """

    kind = "bytes"

    def __init__(self, alphabet: bytes = ALL) -> None:
        if not alphabet or len(set(alphabet)) != len(alphabet):
            raise ValueError(f"alphabet is {alphabet!r}; give at least one byte, and none twice")
        self.alphabet = alphabet
        self._ids = np.full(256, -1, np.int16)
        self._ids[np.frombuffer(alphabet, np.uint8)] = np.arange(len(alphabet), dtype=np.int16)

    @property
    def size(self) -> int:
        """Number of bytes in the alphabet."""
        return len(self.alphabet)

    def encode(self, text: str) -> list[int]:
        """Ids of the bytes of `text`. Raises UserError for a byte outside the alphabet."""
        return self.encode_bytes(torch.tensor(list(text.encode()), dtype=torch.uint8)).tolist()

    def encode_bytes(self, values: Tensor) -> Tensor:
        """(N,) uint8 ids of the bytes with these values (N,) uint8; of all 256, the very tensor. Raises as `encode`."""
        if self.alphabet == ALL:
            return values
        ids = np.empty(len(values), np.uint8)
        for start in range(0, len(values), PIECE):  # so that a memory-mapped text is not whole in memory twice
            piece = values[start : start + PIECE].numpy()
            found = self._ids[piece]
            if (found < 0).any():
                outside = bytes([piece[found.argmin()]])
                raise UserError(f"the byte {outside!r} is not among the {self.size} of the alphabet; leave it out")
            ids[start : start + PIECE] = found
        return torch.from_numpy(ids)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`. Bytes that are not UTF-8, as where ids end within a character, become U+FFFD."""
        ids = [int(i) for i in ids]
        outside = next((i for i in ids if not 0 <= i < self.size), None)
        if outside is not None:
            raise ValueError(f"id {outside} is outside the vocabulary; ids are 0 to {self.size - 1}")
        return bytes(self.alphabet[i] for i in ids).decode(errors="replace")

    def save(self, folder: Path) -> None:
        """Writes `folder`/tokenizer.json, which `load_tokenizer` reads."""
        document = {"kind": self.kind, "alphabet": list(self.alphabet)}
        (folder / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")

    @classmethod
    def from_document(cls, document: dict[str, Any]) -> Bytes:
        """The tokenizer that `save` wrote, from its parsed JSON. Raises ValueError if it is not one."""
        try:
            return cls(bytes(document.get("alphabet", ())))
        except TypeError:
            raise ValueError("'alphabet' is not a list of bytes") from None


def count_bytes(parts: list[Tensor], names: dict[int, str]) -> tuple[list[Tensor], Vocabulary]:
    """Bytes as the words of a vocabulary: by descending count in all parts, ties in the order of first appearance.

    `names` gives the word of each byte; a byte without one is left out.
    """
    counts = np.zeros(256, np.int64)
    met: list[int] = []
    for part in parts:
        for piece in part.split(PIECE):
            values = piece.numpy()
            here = np.bincount(values, minlength=256)
            new = np.flatnonzero((here > 0) & (counts == 0)).tolist()
            met += sorted(new, key=lambda value: int((values == value).argmax()))
            counts += here
    order = sorted((value for value in met if value in names), key=lambda value: -counts[value])
    ids = np.zeros(256, np.uint8)
    ids[order] = np.arange(len(order), dtype=np.uint8)
    kept = np.zeros(256, bool)
    kept[order] = True
    tokens = [torch.from_numpy(ids[part.numpy()[kept[part.numpy()]]]) for part in parts]
    return tokens, Vocabulary([names[value] for value in order], end_of_line=False, lower_case=True)
