"""A long text as a sequence of batches that a model with memory reads in order."""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch
from torch import Tensor

from equilibria.solution import UserError


class OrderedBatches:
    """Cuts N tokens into B lanes that are read side by side, L tokens at a time, each lane in the order of the text.

    The lanes have T = N // B tokens each; the N - B T last tokens of the text are left out. Segment i covers the
    positions p = i L .. min((i + 1) L, T - 1) - 1 of every lane, and

        inputs[b, p - i L] = tokens[b T + p],    targets[b, p - i L] = tokens[b T + p + 1].

    So lane b of segment i + 1 goes on where lane b of segment i stopped, which is what a memory carried from one
    segment to the next needs. There are ceil((T - 1) / L) segments; the last may be shorter. Each is two tensors
    (B, L) of int64 on `device`, new ones at each call. The first token of a lane is never a target.

    This is the ordered iterator of Transformer-XL (Dai et al., ACL 2019), batch first.

        for inputs, targets in OrderedBatches(torch.arange(100), batch_size=4, length=8): ...

    `tokens` (N,) are integers. Raises UserError if there are fewer than 2 B of them, since a lane needs an input and a
    target, and ValueError or TypeError for a tensor of another shape or type and for a B or L below 1.
    """

    def __init__(self, tokens: Tensor, batch_size: int, length: int, device: torch.device | str | None = None) -> None:
        if tokens.ndim != 1:
            raise ValueError(f"tokens has shape {tuple(tokens.shape)}; give one text, of shape (N,)")
        if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
            raise TypeError(f"tokens has dtype {tokens.dtype}; give integers, such as torch.int64")
        if batch_size < 1 or length < 1:
            raise ValueError(f"batch_size is {batch_size} and length is {length}; both must be at least 1")
        if len(tokens) < 2 * batch_size:
            raise UserError(
                f"{len(tokens):,} tokens are too few for a batch size of {batch_size}, which needs {2 * batch_size:,}; "
                "take a longer text or a smaller batch size"
            )
        self.batch_size = batch_size
        self.length = length
        self.device = tokens.device if device is None else torch.device(device)
        lane = len(tokens) // batch_size
        # A view: the text stays where it is, and only a segment at a time is copied to the device.
        self.lanes = tokens[: batch_size * lane].view(batch_size, lane)  # (B, T)

    def __len__(self) -> int:
        return -(-(self.lanes.shape[1] - 1) // self.length)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        i = operator.index(i)
        segments = len(self)
        if not -segments <= i < segments:
            raise IndexError(f"segment {i} of {segments}")
        start = (i % segments) * self.length
        segment = self.lanes[:, start : start + self.length + 1]  # (B, L + 1)
        return self._copy(segment[:, :-1]), self._copy(segment[:, 1:])

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return (self[i] for i in range(len(self)))

    def _copy(self, part: Tensor) -> Tensor:
        # A copy even on the same device, so that a caller who writes into a batch does not change the text.
        return part.to(self.device, torch.int64, copy=True, memory_format=torch.contiguous_format)
