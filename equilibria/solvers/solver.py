"""What a solver is: two functions, `init` and `step`, over a state that always knows f at its z."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Protocol, Self, TypeVar

import torch
from torch import Tensor

from equilibria.stopping import work_dtype


class Map(Protocol):
    """z (B, D) -> f(z) (B, D); every call is counted against a budget."""

    def __call__(self, z: Tensor, /) -> Tensor: ...

    @property
    def remaining(self) -> int:
        """Calls left. `step` is called only with at least one left, and must not use more than are left."""
        ...


@dataclass(frozen=True, kw_only=True)
class State:
    """Where a solve stands. Solvers add fields: tensors with the batch first, or integers shared by all samples.

    Tensors other than z, fz and g may be overwritten by the next step (ring buffers are); those three never are.
    """

    z: Tensor
    """(B, D) the iterate."""
    fz: Tensor
    """(B, D) f(z), always at this very z."""
    g: Tensor
    """(B, D) f(z) - z, in float32 at least."""

    def take(self, rows: Tensor) -> Self:
        """The state of some samples alone."""
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{k: v.index_select(0, rows) for k, v in tensors.items() if isinstance(v, Tensor)})


S = TypeVar("S", bound=State)


class Solver(Protocol[S]):
    """A root solver for g(z) = f(z) - z. It holds no tolerance and no loop: those are `Stopping` and `iterate`."""

    def init(self, f: Map, z0: Tensor) -> S:
        """The state at z0; one evaluation of f."""
        ...

    def step(self, f: Map, state: S) -> S:
        """The state one step later; at least one evaluation of f. Samples must not influence each other."""
        ...


def difference(fz: Tensor, z: Tensor) -> Tensor:
    """f(z) - z in float32 at least."""
    dtype = work_dtype(z.dtype)
    return fz.to(dtype) - z.to(dtype)


def write(buffer: Tensor, slot: int, value: Tensor) -> Tensor:
    """buffer (B, m, D) with `value` (B, D) in one slot: in place, or as a copy where autograd records the solve."""
    if torch.is_grad_enabled() and (buffer.requires_grad or value.requires_grad):
        index = torch.tensor([slot], device=buffer.device)
        return buffer.index_copy(1, index, value.unsqueeze(1))
    buffer[:, slot] = value
    return buffer


def check_damping(name: str, damping: float) -> None:
    if not 0.0 < damping <= 2.0:
        raise ValueError(f"{name}(damping={damping}): damping must lie in (0, 2]; 1 is the undamped step")


def check_count(name: str, option: str, value: int, least: int) -> None:
    if not isinstance(value, int) or value < least:
        raise ValueError(f"{name}({option}={value!r}): {option} must be an integer >= {least}")
