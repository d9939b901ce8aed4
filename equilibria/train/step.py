"""The gradient of one optimizer step, over its segments, the parts of a batch, and the processes of a job."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from equilibria.adjoints.implicit_function import tell_nonfinite
from equilibria.solution import NonFiniteError, Stats
from equilibria.train.distributed import Ranks
from equilibria.train.parallel import gradient_sum
from equilibria.train.reading import Part


class Segment(NamedTuple):
    """What came of the rows of one segment."""

    loss: float
    """Their share of the mean loss of the whole batch, times the number of processes: the mean of this over them is it."""
    memories: list[Any]
    """Of each part."""
    solves: list[Stats]


class Agreed(NamedTuple):
    """What the processes told each other at the end of a step, alike on all of them."""

    norm: float
    """Of the gradient, before it was clipped."""
    stop: bool
    """Whether one of them was asked to stop."""
    seconds: float
    """Of the first one's clock."""


class Gradient:
    """Adds up the gradient of a step.

    Within a step the processes meet when their gradients are averaged, and once more to agree that all is finite and
    nobody was asked to stop. A process whose numbers are not finite goes on with a gradient of NaN until then, for the
    others would wait for it otherwise; afterwards all of them raise the same NonFiniteError.
    """

    def __init__(self, model: nn.Module, accelerator: Accelerator, ranks: Ranks) -> None:
        self.model, self.accelerator, self.ranks = model, accelerator, ranks
        self._fault: NonFiniteError | None = None

    def add(self, parts: Sequence[Part], *, depth: int | None, jacobian: float, of: int, last: bool) -> Segment:
        """Add that of a segment, one `of` several whose mean counts; `jacobian` is the weight of the Jacobian loss.

        Each part, a forward and a backward pass, has its share of the mean loss. Averaging over processes divides by their
        number, which the loss is multiplied with, so that shares need not be equal.
        """
        mean, memories, solves = 0.0, [], []
        for index, part in enumerate(parts):
            with gradient_sum(self.accelerator, self.model, last=last and index == len(parts) - 1):
                loss, output = self._loss(part, depth, jacobian)
                with contextlib.nullcontext() if self.ranks.count == 1 else tell_nonfinite(self._blame):
                    self.accelerator.backward(loss * (self.ranks.count / of))
            memories.append(output.memory)
            if part.share > 0:
                mean += part.share * self._nll
                solves += output.stats
        return Segment(mean * self.ranks.count, memories, solves)

    def agree(self, clip: float, *, stop: bool, seconds: float) -> Agreed:
        """Clip the gradient and let all processes know how the step went; NonFiniteError on each if it failed on one."""
        clipped = self.accelerator.clip_grad_norm_(self.model.parameters(), clip)
        assert clipped is not None
        norm = (clipped.full_tensor() if isinstance(clipped, DTensor) else clipped).item()
        ranks, fault = self.ranks, self._fault
        told = torch.tensor([fault is not None, stop, seconds if ranks.is_main else 0.0], dtype=torch.float64)
        faults, stops, seconds = ranks.sum(told).tolist()
        if faults:
            self._fault = None
            messages = ranks.gather(None if fault is None else str(fault))
            rank, message = next((rank, message) for rank, message in enumerate(messages) if message is not None)
            raise NonFiniteError(f"process {rank}: {message}", None if fault is None else fault.solution)
        return Agreed(require_finite(norm, "the gradient"), stops > 0, seconds)

    def _blame(self, error: NonFiniteError) -> None:
        self._fault = error

    def _loss(self, part: Part, depth: int | None, jacobian: float) -> tuple[Tensor, Any]:
        tokens, targets, memory, share = part
        try:
            output = self.model(tokens, targets, memory, depth=depth, jacobian=jacobian > 0)
            loss = output.nll.mean()
            self._nll = require_finite(loss.item(), "the loss")
            if output.jacobian is not None:
                loss = loss + jacobian * output.jacobian
        except NonFiniteError as error:
            if self.ranks.count == 1:
                raise
            self._fault, self._nll = error, math.nan
            output = self.model(tokens, targets, memory, depth=1)  # a stack, which nothing has to be solved for
            loss = output.nll.mean() * math.nan
        return share * loss, output


def require_finite(number: float, what: str) -> float:
    """The number; NonFiniteError, which names `what` it is, if it is infinite or NaN."""
    if not math.isfinite(number):
        raise NonFiniteError(f"{what} became infinite or NaN")
    return number
