"""Reading the training split: batch after batch, epoch after epoch, with the memory that the model carries."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from equilibria.data import Batches
from equilibria.train.state import TrainState


class Part(NamedTuple):
    """Some of the rows of a batch."""

    tokens: Tensor
    """(b, L)"""
    targets: Tensor
    """(b, L)"""
    memory: Any
    """What the batch before left for these rows; None at the start of a text."""
    share: float
    """Of the targets of the batch."""


class Reader:
    """The place in the training split, which `state` holds, and the memory there.

    Batches that carry no memory, those of independent sequences, are read with None each time; so is the first batch of
    an epoch. A memory is a NamedTuple of batch-first tensors, whatever its class.
    """

    def __init__(self, batches: Batches, state: TrainState) -> None:
        self.state, self.memory = state, None
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

    def next(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets (B, L) of the next batch; `memory` is then what to read them with."""
        state = self.state
        if self.at_end:
            state.epoch, state.segment, self.memory = state.epoch + 1, 0, None
            self.batches = self._all.at_epoch(state.epoch)
        batch = self.batches[state.segment]
        state.segment += 1
        return batch

    def parts(self, tokens: Tensor, targets: Tensor, count: int) -> Iterator[Part]:
        """The rows of the batch in at most `count` parts of nearly equal size, each with the memory of its rows."""
        rows = len(tokens)
        sizes = [len(part) for part in tokens.chunk(count)]
        start = 0
        for size in sizes:
            chosen = slice(start, start + size)
            memory = None if self.memory is None else type(self.memory)(*(each[chosen] for each in self.memory))
            yield Part(tokens[chosen], targets[chosen], memory, size / rows)
            start += size

    def remember(self, memories: Sequence[Any]) -> None:
        """Keep what the parts of a batch left."""
        if not self.batches.carries_memory or any(memory is None for memory in memories):
            self.memory = None
        elif len(memories) == 1:
            self.memory = memories[0]
        else:
            self.memory = type(memories[0])(*(torch.cat(each) for each in zip(*memories, strict=True)))
