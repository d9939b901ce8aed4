"""The processes of a job: which of them this is, which rows it reads, and how they add up and tell each other things."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor

from equilibria.solution import UserError

T = TypeVar("T")
# The first process may have a corpus to fetch and cut into tokens while the others wait for it.
PATIENCE = datetime.timedelta(hours=12)
MOMENT = datetime.timedelta(seconds=2)


class Ranks:
    """The processes of a job, of which this is number `rank` of `count`; one process alone is a job of one.

    Process r reads the rows r B // N to (r + 1) B // N of each batch of B, so that together they read what one process
    would. The first, `is_main`, alone writes and prints. The methods that communicate must be called by all of them, in the
    same order, and cost nothing in a job of one.
    """

    def __init__(self, rank: int = 0, count: int = 1, device: torch.device | None = None) -> None:
        self.rank, self.count = rank, count
        self.device = torch.device("cpu") if device is None else device

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    # -- shares of a batch ---------------------------------------------------------------------------------------

    def rows(self, batch: int) -> slice:
        """The rows of a batch that this process reads; none where there are fewer rows than processes.

        >>> [Ranks(rank, 3).rows(8) for rank in range(3)]
        [slice(0, 2, None), slice(2, 5, None), slice(5, 8, None)]
        """
        return slice(self.rank * batch // self.count, (self.rank + 1) * batch // self.count)

    # -- what all of them must call ------------------------------------------------------------------------------

    def sum(self, values: Tensor) -> Tensor:
        """The sums over all processes, entry by entry, of a float64 tensor on the CPU."""
        if self.count == 1:
            return values
        total = values.to(self.device, copy=True)
        dist.all_reduce(total)
        return total.cpu()

    def any(self, condition: bool) -> bool:
        """Whether the condition holds on some process."""
        return bool(self.sum(torch.tensor([condition], dtype=torch.float64)) > 0)

    def gather_rows(self, tensor: Tensor) -> Tensor:
        """The rows of all processes, in order, on the first; its own elsewhere. Each must have equally many."""
        if self.count == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.count)] if self.is_main else None
        dist.gather(tensor.contiguous(), parts)
        return tensor if parts is None else torch.cat(parts)

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in order, on each of them; small ones."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, tensor: Tensor) -> None:
        """Fill a tensor with that of the first process."""
        if self.count > 1:
            moved = tensor.to(self.device)  # a step count on the CPU travels by way of the GPU
            dist.broadcast(moved, src=0)
            tensor.copy_(moved)

    def from_main(self, make: Callable[[], T]) -> T:
        """What `make` returns on the first process, where alone it is called; an error there is an error everywhere."""
        if self.count == 1:
            return make()
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = make()
            except UserError as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=0, device=self.device)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    @contextlib.contextmanager
    def main_first(self, name: str) -> Iterator[None]:
        """The first process goes through the block before the others begin, then those that are first on their machines.

        For what is kept on the disk once it was made. `name` tells one such block from another. The others wait for hours
        if need be; where the block fails on the process they wait for, they go through it themselves, and fail as it did.
        """
        if self.count == 1:
            yield
            return
        first_here = int(os.environ.get("LOCAL_RANK", self.rank)) == 0
        machine = os.environ.get("GROUP_RANK", "0")  # torchrun numbers the machines
        store = _store()
        if not self.is_main:
            store.wait([f"{name}/0"], PATIENCE)
            if not first_here:
                store.wait([f"{name}/machine/{machine}"], PATIENCE)
        try:
            yield
        finally:
            if self.is_main:
                store.set(f"{name}/0", "done")
            if first_here:
                store.set(f"{name}/machine/{machine}", "done")

    def blame(self, message: str) -> dict[int, str]:
        """Leave word that this process cannot go on, and why; return the messages of all that can not, by rank.

        No meeting: the others may be anywhere. Those that fail in the same way do so within moments, and are waited for.
        """
        store = _store()
        store.set(f"fault/{self.rank}", message)
        with contextlib.suppress(dist.DistError):  # it has waited for nothing where the others go on
            store.wait([f"fault/{rank}" for rank in range(self.count)], MOMENT)
        return {rank: store.get(f"fault/{rank}").decode() for rank in range(self.count) if store.check([f"fault/{rank}"])}

    def close(self) -> None:
        """Leave the job; afterwards no process may wait for another."""
        if self.count > 1 and dist.is_initialized():
            dist.destroy_process_group()


ALONE = Ranks()


def join_job() -> Ranks:
    """Meet the other processes that `torchrun` or `accelerate launch` has started, if it has started any.

    On GPUs they speak NCCL, on CPUs gloo. Each gets its share of the cores, unless OMP_NUM_THREADS says otherwise.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Ranks(device=PartialState().device)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if here > 1 and os.environ.get("OMP_NUM_THREADS", "1") == "1":  # to which torchrun sets it
        torch.set_num_threads(max(1, _cores() // here))
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))  # else Accelerate chooses, and warns of it
    try:
        on_cpu = os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true"
        state = PartialState(cpu=on_cpu or not torch.cuda.is_available())
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"process {os.environ.get('RANK', '?')} of {os.environ['WORLD_SIZE']} did not find the others ({reason}); "
            "start them all with torchrun or accelerate launch, and give each machine the same --rdzv-endpoint"
        ) from error
    return Ranks(state.process_index, state.num_processes, state.device)


def lost_another(error: BaseException) -> bool:
    """Whether an error only says that another process of the job is gone."""
    signs = ("gloo", "Connection closed by peer", "NCCL")
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
    )


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _store() -> Any:
    """Where processes leave word for each other without meeting; that of the process group."""
    return dist.distributed_c10d._get_default_store()
