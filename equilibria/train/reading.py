"""Reading the training split: batch after batch, epoch after epoch, with the memory that the model carries."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from equilibria.data import Batches
from equilibria.train.distributed import ALONE, Ranks
from equilibria.train.state import TrainState


class Rows(NamedTuple):
    """The rows of a batch that one process reads."""

    tokens: Tensor
    """(b, L)"""
    targets: Tensor
    """(b, L)"""
    share: float
    """Of the rows of the whole batch."""
    size: int
    """Targets of the whole batch."""


def rows_of(batch: tuple[Tensor, Tensor], ranks: Ranks) -> Rows:
    """The rows of this process. Where there are fewer rows than processes it may have none, and gets the first row with a
    share of 0: every process must take part in what they do together, such as adding up their gradients.
    """
    tokens, targets = batch
    chosen, whole = ranks.rows(len(tokens)), len(tokens)
    share = (chosen.stop - chosen.start) / whole
    if share == 0:
        chosen = slice(0, 1)
    return Rows(tokens[chosen], targets[chosen], share, targets.numel())


class Part(NamedTuple):
    """Some of the rows of a batch."""

    tokens: Tensor
    """(b, L)"""
    targets: Tensor
    """(b, L)"""
    memory: Any
    """What the batch before left for these rows; None at the start of a text."""
    share: float
    """Of the targets of the whole batch; 0 for a row that stands in where a process has none of its own."""


class Reader:
    """The place in the training split, which `state` holds, and the memory there of the rows that this process reads.

    Batches that carry no memory, those of independent sequences, are read with None each time; so is the first batch of
    an epoch. A memory is a NamedTuple of batch-first tensors, whatever its class.
    """

    def __init__(self, batches: Batches, state: TrainState, ranks: Ranks = ALONE) -> None:
        self.state, self.ranks = state, ranks
        self.memory: Any = None
        self._all, self.batches = batches, batches.at_epoch(state.epoch)

    def read_since(self, start: TrainState) -> list[tuple[Tensor, Tensor]]:
        """The whole batches read since an earlier state: inputs and targets (B, L) of each."""
        found, place = [], (start.epoch, start.segment)
        while place != (self.state.epoch, self.state.segment):
            epoch, segment = place
            batches = self._all.at_epoch(epoch)
            if segment == len(batches):
                place = (epoch + 1, 0)
            else:
                found.append(batches[segment])
                place = (epoch, segment + 1)
        return found

    @property
    def at_end(self) -> bool:
        """Whether the last batch of an epoch was read."""
        return self.state.segment == len(self.batches)

    def ended_in_last(self, count: int) -> bool:
        """Whether an epoch ended within the last `count` batches, which may have gone on into the next."""
        return self.at_end or (self.state.epoch > 0 and self.state.segment < count)

    @property
    def epochs(self) -> int:
        """Whole readings of the split so far."""
        return self.state.epoch + self.at_end

    def next(self) -> Rows:
        """This process's rows of the next batch; `memory` is then what to read them with."""
        state = self.state
        if self.at_end:
            state.epoch, state.segment, self.memory = state.epoch + 1, 0, None
            self.batches = self._all.at_epoch(state.epoch)
        batch = self.batches[state.segment]
        state.segment += 1
        return rows_of(batch, self.ranks)

    def parts(self, rows: Rows, count: int) -> Iterator[Part]:
        """The rows in at most `count` parts of nearly equal size, each with its memory."""
        start = 0
        for size in [len(part) for part in rows.tokens.chunk(count)]:
            chosen = slice(start, start + size)
            memory = None if self.memory is None else type(self.memory)(*(each[chosen] for each in self.memory))
            yield Part(rows.tokens[chosen], rows.targets[chosen], memory, rows.share * size / len(rows.tokens))
            start += size

    def remember(self, memories: Sequence[Any]) -> None:
        """Keep what the parts of a batch left."""
        if not self.batches.carries_memory or any(memory is None for memory in memories):
            self.memory = None
        elif len(memories) == 1:
            self.memory = memories[0]
        else:
            self.memory = type(memories[0])(*(torch.cat(each) for each in zip(*memories, strict=True)))
