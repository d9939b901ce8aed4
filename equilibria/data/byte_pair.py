"""Pieces of words as tokens: byte-level byte-pair encoding, for any text."""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Tokenizer as HFTokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from torch import Tensor

BYTES = 256
CHUNK = 1 << 16  # characters that one thread encodes at a time
CHUNKS_AT_ONCE = 64  # bounds the memory that encodings in flight take, far above one thread per core


class BytePair:
    """Maps text to ids of byte sequences and back without loss: `decode(encode(text)) == text` for every text.

    Starts from the 256 bytes and repeatedly merges the most frequent pair of neighbours within a word (Sennrich, Haddow
    and Birch, ACL 2016; on bytes as in Radford et al., 2019, section 2.2). There are no special tokens: nothing that
    stands in a text has a second meaning.

        BytePair.train("a text to learn from " * 9, vocab_size=300).encode("a text")
    """

    kind = "byte-pair"

    def __init__(self, tokenizer: HFTokenizer) -> None:
        self._tokenizer = tokenizer

    @classmethod
    def train(cls, text: str, vocab_size: int) -> BytePair:
        """Learns at most `vocab_size` tokens, the 256 bytes included, from `text`.

        A pair that occurs once is not merged, so a short text gives fewer tokens; `size` says how many.
        Raises ValueError if `vocab_size` is below 256.
        """
        if vocab_size < BYTES:
            raise ValueError(f"vocab_size is {vocab_size}; it must be at least {BYTES}, one token for each byte")
        tokenizer = HFTokenizer(BPE())
        tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
        tokenizer.decoder = ByteLevelDecoder()  # pyright: ignore[reportAttributeAccessIssue]
        trainer = BpeTrainer(
            vocab_size=vocab_size, min_frequency=2, initial_alphabet=ByteLevel.alphabet(), show_progress=False
        )
        tokenizer.train_from_iterator(_chunks(text), trainer)
        return cls(tokenizer)

    @property
    def size(self) -> int:
        """Number of tokens."""
        return self._tokenizer.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """Ids of the tokens of `text`."""
        return self._encode(text).tolist()

    def encode_tensor(self, text: str) -> Tensor:
        """(N,) int64: what `encode` gives, without a list of Python integers in between."""
        ids = self._encode(text)
        return torch.frombuffer(ids, dtype=torch.int64) if ids else torch.empty(0, dtype=torch.int64)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`. Bytes that are not UTF-8, as where ids end within a character, become U+FFFD."""
        ids = [int(i) for i in ids]
        outside = next((i for i in ids if not 0 <= i < self.size), None)
        if outside is not None:
            raise ValueError(f"id {outside} is outside the vocabulary; ids are 0 to {self.size - 1}")
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def save(self, folder: Path) -> None:
        """Writes `folder`/tokenizer.json, which `load_tokenizer` and Hugging Face's libraries read."""
        self._tokenizer.save(str(folder / "tokenizer.json"), pretty=False)

    @classmethod
    def from_json(cls, document: str) -> BytePair:
        """The tokenizer that `save` wrote, from the text of its file. Raises ValueError if it is not one."""
        try:
            return cls(HFTokenizer.from_str(document))
        except Exception as error:  # the library raises no narrower class
            raise ValueError(str(error)) from None

    def _encode(self, text: str) -> array[int]:
        ids = array("q")
        chunks = _chunks(text)
        while group := list(islice(chunks, CHUNKS_AT_ONCE)):
            for encoding in self._tokenizer.encode_batch_fast(group, add_special_tokens=False):
                ids.extend(encoding.ids)
        return ids


def _chunks(text: str, size: int = CHUNK) -> Iterator[str]:
    """Cuts a text into chunks of about `size` >= 1 characters, whose tokens together are the tokens of the whole text.

    That holds for a cut between a visible character and a space or newline. No word, as byte-level encoding knows
    them, goes on over such a place, and none depends on what lies on its other side. (Between white space and a
    visible character it would: a run of white space ends one character early where a visible character follows.)
    """
    cut = re.compile(r"(?<=\S)[ \n]")
    start = 0
    while start < len(text):
        found = cut.search(text, start + size)
        end = found.start() if found else len(text)
        yield text[start:end]
        start = end
