"""A corpus: three splits as tokens, and what tells which token stands for what."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from equilibria.data.batching import Batches, OrderedBatches, SequenceBatches
from equilibria.data.tokenizer import Tokenizer
from equilibria.data.variable_length import VariableLengthBatches
from equilibria.solution import UserError

PIECE = 1 << 20  # tokens that are converted at a time


@dataclass(frozen=True, eq=False)
class Split:
    """One part of a text, as tokens.

    With a mean loss of `nll` nats per token, it is coded in nll / ln 2 / bytes_per_token bits per byte, a figure that
    can be compared between tokenizers.
    """

    tokens: Tensor
    """(N,) integers; int32 and memory-mapped where the text is large. For independent sequences, (N, L)."""
    text_bytes: int | None
    """Length in bytes, as UTF-8, of the text that the tokens stand for; None where they stand for no text."""
    documents: int | None = None
    """How many documents the text is, with a token between each and the next that stands for no byte; None: it is one."""

    @property
    def bytes_per_token(self) -> float | None:
        """Mean number of bytes that a token stands for; None where there is no text, nor bits per byte."""
        return None if self.text_bytes is None else self.text_bytes / len(self.tokens)

    @property
    def max_batch_size(self) -> int:
        """The largest batch size that `batches` can take."""
        return max(1, len(self.tokens) // 2)

    def batches(
        self,
        batch_size: int,
        length: int,
        device: torch.device | str | None = None,
        *,
        seed: int = 0,
        variable_length: bool = False,
        extended_context: int = 0,
    ) -> Batches:
        """The split as batches of `batch_size` rows of up to `length` tokens, on `device` (None: where the tokens are).

        A text is read in order (`OrderedBatches`), whatever the seed. Independent sequences are shuffled by (seed,
        epoch) in `at_epoch`; they are never cut, so that a `length` below theirs is an error (`SequenceBatches`), as
        are the other options. With `variable_length` the segments of a text vary in length about `length`, drawn from
        (seed, epoch) (`VariableLengthBatches`); with an `extended_context` inputs begin with as many tokens more.
        """
        if variable_length:
            return VariableLengthBatches(
                self.tokens, batch_size, length, device, seed=seed, extended_context=extended_context
            )
        return OrderedBatches(self.tokens, batch_size, length, device, extended_context=extended_context)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the tokens as int64, in hexadecimal digits. Computed once: it takes seconds for 10^8 tokens."""
        return _fingerprint(self.tokens)


@dataclass(frozen=True, eq=False)
class SequenceSplit(Split):
    """Independent sequences, each with a target at every position."""

    targets: Tensor = field(kw_only=True)
    """(N, L) integers, the target of every position of `tokens` (N, L)."""

    @property
    def max_batch_size(self) -> int:
        """The number of sequences."""
        return len(self.tokens)

    def batches(
        self,
        batch_size: int,
        length: int,
        device: torch.device | str | None = None,
        *,
        seed: int = 0,
        variable_length: bool = False,
        extended_context: int = 0,
    ) -> Batches:
        """See `Split.batches`. Raises UserError if `length` is below the length of the sequences."""
        if variable_length or extended_context:
            raise UserError("segments of variable length and extended context are for a text; leave them out here")
        if length < self.tokens.shape[1]:
            raise UserError(
                f"the sequences have {self.tokens.shape[1]} tokens and are not cut, but the length is {length}; "
                f"give a length of {self.tokens.shape[1]}"
            )
        return SequenceBatches(self.tokens, self.targets, batch_size, device, seed=seed)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of inputs and targets."""
        return _fingerprint(self.tokens, self.targets)


@dataclass(frozen=True, eq=False)
class Corpus:
    """Three splits and the tokenizer of them all."""

    name: str
    train: Split
    valid: Split
    test: Split
    tokenizer: Tokenizer
    """Never None: symbols that stand for no text have names too, as those of the copy-memory task do."""
    test_text: str | None
    """The text of the test split as it was before tokenisation; None where it is long, or the tokens stand for none."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of those of the train and validation splits: two corpora that share it train a model alike, and find the
        same weights best."""
        return hashlib.sha256(f"{self.train.fingerprint} {self.valid.fingerprint}".encode()).hexdigest()


def _fingerprint(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        for piece in tensor.reshape(-1).split(PIECE):  # so that a memory-mapped text is never whole in memory
            digest.update(piece.to("cpu", torch.int64).contiguous().numpy().data)
    return digest.hexdigest()
