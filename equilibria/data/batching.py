"""What training and evaluation read: a list of batches, of one long text or of independent sequences."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from equilibria.solution import UserError


class Batches(Protocol):
    """A list of batches, each of inputs (B, L) and the targets (B, L) of the same positions, int64 on one device.

    B and L may differ from batch to batch, so a mean over a split weighs each batch by its number of targets.
    """

    @property
    def carries_memory(self) -> bool:
        """Whether row b of a batch goes on where row b of the batch before it stopped."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]: ...

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]: ...

    def at_epoch(self, epoch: int) -> Batches:
        """The batches of an epoch 0, 1, ... of training, the same whenever they are asked for."""
        ...


class OrderedBatches:
    """Cuts N tokens into B lanes that are read side by side, L tokens at a time, each lane in the order of the text.

    The lanes have T = N // B tokens each; the N - B T last tokens of the text are left out. Segment i covers the
    positions p = i L .. min((i + 1) L, T - 1) - 1 of every lane, and

        inputs[b, p - i L] = tokens[b T + p],    targets[b, p - i L] = tokens[b T + p + 1].

    So lane b of segment i + 1 goes on where lane b of segment i stopped, which is what a memory carried from one
    segment to the next needs. There are ceil((T - 1) / L) segments; the last may be shorter. Each is two tensors
    (B, L) of int64 on `device`, new ones at each call. The first token of a lane is never a target. Every epoch reads
    the same segments.

    With an `extended_context` of E tokens the inputs of a segment begin with the min(E, i L) tokens before it, so that
    its targets are those of its last positions.

    Source: the ordered iterator of Transformer-XL (Dai et al., ACL 2019), batch first.

    >>> batches = OrderedBatches(torch.arange(100), batch_size=4, length=8)
    >>> len(batches), batches[0][0].shape
    (3, torch.Size([4, 8]))

    `tokens` (N,) are integers. Raises UserError if there are fewer than 2 B of them, since a lane needs an input and a
    target, and ValueError or TypeError for a tensor of another shape or type, for a B or L below 1 and an E below 0.
    """

    carries_memory = True

    def __init__(
        self,
        tokens: Tensor,
        batch_size: int,
        length: int,
        device: torch.device | str | None = None,
        *,
        extended_context: int = 0,
    ) -> None:
        if tokens.ndim != 1:
            raise ValueError(f"tokens has shape {tuple(tokens.shape)}; give one text, of shape (N,)")
        _check_integers("tokens", tokens)
        if batch_size < 1 or length < 1:
            raise ValueError(f"batch_size is {batch_size} and length is {length}; both must be at least 1")
        if extended_context < 0:
            raise ValueError(f"extended_context is {extended_context}; it must be at least 0")
        if len(tokens) < 2 * batch_size:
            raise UserError(
                f"{len(tokens):,} tokens are too few for a batch size of {batch_size}, which needs {2 * batch_size:,}; "
                "take a longer text or a smaller batch size"
            )
        self.batch_size = batch_size
        self.length = length
        self.extended_context = extended_context
        self.device = tokens.device if device is None else torch.device(device)
        lane = len(tokens) // batch_size
        # A view: the text stays where it is, and only a segment at a time is copied to the device.
        self.lanes = tokens[: batch_size * lane].view(batch_size, lane)  # (B, T)

    def __len__(self) -> int:
        return -(-(self.lanes.shape[1] - 1) // self.length)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        start = position(i, len(self)) * self.length
        end = min(start + self.length, self.lanes.shape[1] - 1)
        return self._segment(start, end)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return (self[i] for i in range(len(self)))

    def at_epoch(self, epoch: int) -> OrderedBatches:
        """These batches: a text is read in its own order, every time."""
        return self

    def _segment(self, start: int, end: int) -> tuple[Tensor, Tensor]:
        inputs = self.lanes[:, max(0, start - self.extended_context) : end]  # (B, E + L)
        return _copy(inputs, self.device), _copy(self.lanes[:, start + 1 : end + 1], self.device)


class SequenceBatches:
    """Independent sequences, B at a time; nothing is carried from one batch to the next.

    As made, the sequences stand in their given order, which is that of an evaluation. `at_epoch(e)` has them in an
    order drawn from (seed, e) alone, so that a training run can take up an epoch in its middle. There are ceil(N / B)
    batches: the last may have fewer sequences, and none is left out.

    `inputs` and `targets` (N, L) are integers. Raises UserError if B is above N, and ValueError or TypeError for
    tensors of other shapes or types and for a B below 1.

    >>> batches = SequenceBatches(torch.zeros(10, 5, dtype=torch.int64), torch.ones(10, 5, dtype=torch.int64), 4)
    >>> [len(inputs) for inputs, targets in batches.at_epoch(3)]
    [4, 4, 2]
    """

    carries_memory = False

    def __init__(
        self,
        inputs: Tensor,
        targets: Tensor,
        batch_size: int,
        device: torch.device | str | None = None,
        *,
        seed: int = 0,
    ) -> None:
        if inputs.ndim != 2 or inputs.shape != targets.shape:
            raise ValueError(
                f"inputs has shape {tuple(inputs.shape)} and targets {tuple(targets.shape)}; both must be (N, L)"
            )
        _check_integers("inputs", inputs)
        _check_integers("targets", targets)
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        if batch_size > len(inputs):
            raise UserError(
                f"{len(inputs):,} sequences are too few for a batch size of {batch_size}; take a smaller batch size"
            )
        self.inputs, self.targets = inputs, targets
        self.batch_size = batch_size
        self.seed = seed
        self.device = inputs.device if device is None else torch.device(device)
        self.order: Tensor | None = None  # (N,) of this epoch; None: as given

    def __len__(self) -> int:
        return -(-len(self.inputs) // self.batch_size)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        start = position(i, len(self)) * self.batch_size
        which: slice | Tensor = slice(start, start + self.batch_size)
        if self.order is not None:
            which = self.order[which]
        return _copy(self.inputs[which], self.device), _copy(self.targets[which], self.device)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return (self[i] for i in range(len(self)))

    def at_epoch(self, epoch: int) -> SequenceBatches:
        """The same sequences in the order of an epoch."""
        batches = SequenceBatches(self.inputs, self.targets, self.batch_size, self.device, seed=self.seed)
        batches.order = torch.randperm(len(self.inputs), generator=generator(self.seed, epoch)).to(self.inputs.device)
        return batches


def generator(*key: int | str) -> torch.Generator:
    """A source of random numbers on the CPU that depends on all parts of the key alike: (0, 1) and (1, 0) differ."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))


def _check_integers(name: str, tokens: Tensor) -> None:
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise TypeError(f"{name} has dtype {tokens.dtype}; give integers, such as torch.int64")


def position(i: int, count: int) -> int:
    i = operator.index(i)
    if not -count <= i < count:
        raise IndexError(f"segment {i} of {count}")
    return i % count


def _copy(part: Tensor, device: torch.device) -> Tensor:
    # A copy even on the same device, so that a caller who writes into a batch does not change the text.
    return part.to(device, torch.int64, copy=True, memory_format=torch.contiguous_format)
