"""A long text in segments of varying length."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from equilibria.data.batching import OrderedBatches, position


class VariableLengthBatches(OrderedBatches):
    """`OrderedBatches` whose segments have lengths that are drawn anew for every epoch.

    A segment has round-down(n) tokens, n drawn from a normal distribution of standard deviation `std` about L, or in
    one segment of twenty about L / 2; no fewer than `min_length` and no more than L + `max_deviation` std, nor than
    the text still has. So a place in the text is not always at the same distance from where the memory begins.

    Source: the variable-length iterator of Transformer-XL (Dai et al., ACL 2019). `at_epoch(e)` draws from (seed, e);
    the batches as made draw as that code does after numpy.random.seed(seed). With `drop_single`, an epoch ends before a
    last segment of a single token, as it does there; otherwise every token is read.

    >>> batches = VariableLengthBatches(torch.arange(400), batch_size=2, length=20, seed=1)
    >>> sum(inputs.shape[1] for inputs, targets in batches)
    199
    """

    def __init__(
        self,
        tokens: Tensor,
        batch_size: int,
        length: int,
        device: torch.device | str | None = None,
        *,
        seed: int = 0,
        std: float = 5.0,
        min_length: int = 5,
        max_deviation: float = 3.0,
        extended_context: int = 0,
        drop_single: bool = False,
    ) -> None:
        super().__init__(tokens, batch_size, length, device, extended_context=extended_context)
        if std < 0 or max_deviation < 0 or min_length < 1:
            raise ValueError(
                f"std is {std}, max_deviation {max_deviation} and min_length {min_length}; "
                "give at least 0 for the first two and at least 1 for the last"
            )
        self.tokens, self.seed = tokens, seed
        self.std, self.min_length, self.max_deviation, self.drop_single = std, min_length, max_deviation, drop_single
        self.bounds = self._draw(np.random.RandomState(seed))

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        i = position(i, len(self))
        return self._segment(self.bounds[i], self.bounds[i + 1])

    def at_epoch(self, epoch: int) -> VariableLengthBatches:
        """The same text, cut anew."""
        batches = VariableLengthBatches(
            self.tokens,
            self.batch_size,
            self.length,
            self.device,
            seed=self.seed,
            std=self.std,
            min_length=self.min_length,
            max_deviation=self.max_deviation,
            extended_context=self.extended_context,
            drop_single=self.drop_single,
        )
        batches.bounds = self._draw(np.random.RandomState([self.seed, epoch]))
        return batches

    def _draw(self, random: np.random.RandomState) -> list[int]:
        """Where segments begin, and where the last one ends."""
        end = self.lanes.shape[1] - 1
        longest = self.length + self.max_deviation * self.std
        bounds = [0]
        while bounds[-1] < end - (1 if self.drop_single and len(bounds) > 1 else 0):
            mean = self.length if random.random_sample() < 0.95 else self.length / 2
            length = min(longest, max(self.min_length, int(random.normal(mean, self.std))))
            bounds.append(min(end, bounds[-1] + int(length)))
        return bounds
