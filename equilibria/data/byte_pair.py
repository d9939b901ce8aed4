"""Pieces of words as tokens: byte-level byte-pair encoding, for any text."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer as HFTokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from torch import Tensor

from equilibria.data.carve import pieces

BYTES = 256
PIECES_AT_ONCE = 64  # bounds the memory that encodings in flight take, far above one thread per core
END_OF_TEXT = "<|endoftext|>"
KNOWN_ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "<|end|>", "[SEP]")
"""What ends a text in tokenizers that do not say, the first that is a special token."""


class BytePair:
    """Maps text to ids of byte sequences and back without loss: `decode(encode(text)) == text` for every text.

    Starts from the 256 bytes and repeatedly merges the most frequent pair of neighbours within a word (Sennrich, Haddow
    and Birch, ACL 2016; on bytes as in Radford et al., 2019, section 2.2). Nothing that stands in a text has a second
    meaning: `end_of_text`, the token between documents, if there is one, never comes from `encode`.

    A tokenizer made elsewhere (`from_json`) may be of another kind, and then lose what it loses.

        BytePair.train("a text to learn from " * 9, vocab_size=300).encode("a text")
    """

    kind = "byte-pair"

    def __init__(self, tokenizer: HFTokenizer, end_of_text: str | None = None) -> None:
        # A text that spells a special token does not mean it; and some come with settings for short inputs.
        tokenizer.encode_special_tokens = True
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer, self.end_of_text = tokenizer, end_of_text
        self._size = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1  # ids may have gaps
        self.end_id: int | None = None if end_of_text is None else tokenizer.token_to_id(end_of_text)
        if end_of_text is not None and self.end_id is None:
            raise ValueError(f"{end_of_text!r} is to end a text, but is no token")

    @classmethod
    def train(cls, text: str | Iterable[str], vocab_size: int, end_of_text: str | None = None) -> BytePair:
        """Learns at most `vocab_size` tokens, the 256 bytes and `end_of_text` included, from a text, or from several.

        A pair that occurs once is not merged, so a short text gives fewer tokens; `size` says how many.
        Raises ValueError if `vocab_size` is below 256, or 257 with an `end_of_text`.
        """
        least = BYTES + (end_of_text is not None)
        if vocab_size < least:
            ends = " and one for the end of a text" if end_of_text else ""
            raise ValueError(f"vocab_size is {vocab_size}; it must be at least {least}, one token for each byte{ends}")
        tokenizer = HFTokenizer(BPE())
        tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
        tokenizer.decoder = ByteLevelDecoder()  # pyright: ignore[reportAttributeAccessIssue]
        trainer = BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            initial_alphabet=ByteLevel.alphabet(),
            special_tokens=[] if end_of_text is None else [end_of_text],
            show_progress=False,
        )
        tokenizer.train_from_iterator(pieces(text) if isinstance(text, str) else text, trainer)
        return cls(tokenizer, end_of_text)

    @property
    def size(self) -> int:
        """Number of tokens."""
        return self._size

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

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each of several texts, which are encoded side by side."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def save(self, folder: Path) -> None:
        """Writes `folder`/tokenizer.json, which `load_tokenizer` and Hugging Face's libraries read.

        A tokenizer_config.json beside it tells them what ends a text.
        """
        (folder / "tokenizer.json").write_text(self.to_json(), encoding="utf-8")
        if self.end_of_text is None:
            (folder / "tokenizer_config.json").unlink(missing_ok=True)
        else:
            about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": self.end_of_text}
            (folder / "tokenizer_config.json").write_text(json.dumps(about, indent=2), encoding="utf-8")

    def to_json(self) -> str:
        """The text of tokenizer.json."""
        return self._tokenizer.to_str(pretty=False)

    @classmethod
    def from_json(cls, document: str, end_of_text: str | None = None) -> BytePair:
        """The tokenizer that `save` wrote, from the text of its file. Raises ValueError if it is not one."""
        try:
            tokenizer = HFTokenizer.from_str(document)
        except Exception as error:  # the library raises no narrower class
            raise ValueError(str(error)) from None
        return cls(tokenizer, end_of_text)

    def ending(self, end_of_text: str | None = None) -> BytePair:
        """The same tokenizer with an end of text: this one, or else one it knows, or else a token that is added to it."""
        special = [token.content for token in self._tokenizer.get_added_tokens_decoder().values() if token.special]
        end = end_of_text or next((known for known in KNOWN_ENDS if known in special), END_OF_TEXT)
        if end not in special:
            self._tokenizer.add_special_tokens([end])
        return BytePair(self._tokenizer, end)

    def _encode(self, text: str) -> array[int]:
        ids = array("q")
        parts = pieces(text)
        while group := list(islice(parts, PIECES_AT_ONCE)):
            for each in self.encode_all(group):
                ids.extend(each)
        return ids


def declared_end(config: Path | None) -> str | None:
    """The end of a text that a tokenizer_config.json names; None without one. Raises ValueError for a damaged file."""
    if config is None or not config.is_file():
        return None
    document: Any = json.loads(config.read_text(encoding="utf-8"))
    token = document.get("eos_token") if isinstance(document, dict) else None
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) and token else None
