"""What a solver is: two functions, `init` and `step`, over a state that always knows f at its z."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, Self, TypeVar, runtime_checkable

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

    def linearize(self, z: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """f(z), and v (B, D) -> J v with J = ∂f/∂z at z. f(z) and each product count as one call."""
        ...


@dataclass(frozen=True, kw_only=True)
class State:
    """Where a solve stands. Solvers add fields: tensors with the batch first, or integers shared by all samples (while
    torch.compile traces a whole solve these are tensors without dimensions).

    Tensors other than z, fz and g may be overwritten by the next step (ring buffers are); those three never are.
    """

    z: Tensor
    """(B, D) the iterate."""
    fz: Tensor
    """(B, D) f(z), always at this very z."""
    g: Tensor
    """(B, D) f(z) - z, in float32 at least."""

    def with_tensor_counts(self) -> Self:
        """The same with its integers as tensors, for a loop in which no value of a tensor may be asked for."""
        counts = {field.name: getattr(self, field.name) for field in fields(self)}
        device = self.z.device
        return replace(self, **{k: torch.tensor(v, device=device) for k, v in counts.items() if isinstance(v, int)})

    def take(self, rows: Tensor) -> Self:
        """The state of some samples alone."""
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{k: v.index_select(0, rows) for k, v in tensors.items() if isinstance(v, Tensor)})


@runtime_checkable
class InverseEstimate(Protocol):
    """A state that knows an estimate H of (I - J)⁻¹: the step that its solver would take is g H."""

    def pull(self, g: Tensor) -> Tensor:
        """gᵀ H for every sample, (B, D) -> (B, D)."""
        ...


S = TypeVar("S", bound=State)


class Solver(Protocol[S]):
    """A root solver for g(z) = f(z) - z. It holds no tolerance and no loop: those are `Stopping` and `iterate`.

    An attribute `traceable` may say that torch.compile can hold its solves in one graph: then no step asks for the value of
    a tensor, nor for that of an integer of its state, and all steps take the same number of evaluations.
    """

    def init(self, f: Map, z0: Tensor) -> S:
        """The state at z0; one evaluation of f."""
        ...

    def step(self, f: Map, state: S) -> S:
        """The state one step later; at least one evaluation of f. Samples must not influence each other."""
        ...


def difference(fz: Tensor, z: Tensor) -> Tensor:
    """f(z) - z in float32 at least."""
    dtype = work_dtype(z.dtype)
    if z.dtype == fz.dtype == dtype:
        return fz - z
    return fz.to(dtype) - z.to(dtype)


def check_choice(name: str, value: Any, methods: Sequence[str], example: str) -> None:
    """Refuse what is no solver, stopping or adjoint, such as the name or the class of one."""
    if isinstance(value, type) or not all(hasattr(value, method) for method in methods):
        raise TypeError(f"{name}={value!r} is no {name}; give an object such as {example}")


def check_damping(name: str, damping: float) -> None:
    if not 0.0 < damping <= 2.0:
        raise ValueError(f"{name}(damping={damping}): damping must lie in (0, 2]; 1 is the undamped step")


def check_factor(name: str, option: str, value: float | None, least: float) -> None:
    if value is not None and not value >= least:
        raise ValueError(f"{name}({option}={value!r}): {option} must be a number >= {least}, or None to do without")


def check_count(name: str, option: str, value: int, least: int) -> None:
    if not isinstance(value, int) or value < least:
        raise ValueError(f"{name}({option}={value!r}): {option} must be an integer >= {least}")
