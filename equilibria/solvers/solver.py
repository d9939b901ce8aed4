"""What a solver is: two functions, `init` and `step`, over a state that always knows f at its z."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from math import isfinite
from typing import Any, Protocol, Self, TypeVar, runtime_checkable

import torch
from torch import Tensor

from equilibria.stopping import work_dtype
from equilibria.transforms import blind, carries_derivatives, differentiating


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


def recorded(*tensors: Tensor) -> bool:
    """Whether reverse or forward mode follows these tensors, so that nothing may be overwritten."""
    return differentiating() and any(map(carries_derivatives, tensors))


# Differences are kept in ring buffers (B, m, D): pair number `age`, counted from 0, lies in slot age mod m. Only the
# functions down to `_slot` know that. Where the age is a tensor, its value is not known and all slots are looked at: those
# not in use hold zeros, and length 0.


def ring(g: Tensor, history: int, dtype: torch.dtype | None = None) -> Tensor:
    """Room for `history` differences like g (B, D), not touched before it is needed, unless all slots will be looked at."""
    shape = (g.shape[0], history, g.shape[1])
    return g.new_zeros(shape, dtype=dtype) if blind() else g.new_empty(shape, dtype=dtype)


def store_difference(history: Tensor, age: int | Tensor, new: Tensor, old: Tensor) -> Tensor:
    """history (B, m, D) with new - old (B, D) as pair `age`: in place, or as a copy where autograd records the solve
    or one graph holds it.

    The difference is taken in float32 at least and rounded to the dtype of the history.
    """
    dtype = history.dtype
    if not new.dtype == old.dtype == dtype or dtype != work_dtype(dtype):
        dtype = torch.promote_types(work_dtype(new.dtype), work_dtype(dtype))
        new, old = new.to(dtype), old.to(dtype)
    if isinstance(age, Tensor):
        return torch.where(_slot(history, 1, age), (new - old).to(history.dtype).unsqueeze(1), history)
    slot = age % history.shape[1]
    if recorded(history, new, old):
        stored = (new - old).to(history.dtype).unsqueeze(1)
        return history.index_copy(1, torch.tensor([slot], device=history.device), stored)
    if history.dtype == dtype:
        torch.sub(new, old, out=history[:, slot])
    else:
        history[:, slot] = new - old
    return history


def store_products(
    matrix: Tensor, age: int | Tensor, row: Tensor, column: Tensor, length: Tensor, ridge: float = 0.0
) -> Tensor:
    """matrix (B, m, m) with the products (B, used) of pair `age` and all pairs in use, and a ridge on the diagonal: in
    place, or as a copy where autograd records the solve or one graph holds it.

    A pair of length (B,) 0 has no products; with 1 on the diagonal the other pairs of its sample stay of use.
    """
    added = (length == 0).to(matrix.dtype).view(-1, 1, 1) if ridge == 0 else ridge
    if isinstance(age, Tensor):
        here, there = _slot(matrix, 1, age), _slot(matrix, 2, age)
        matrix = torch.where(there, column.unsqueeze(2), torch.where(here, row.unsqueeze(1), matrix))
        return torch.where(here & there, matrix + added, matrix)
    slot, used = age % matrix.shape[1], row.shape[1]
    matrix = matrix.clone() if recorded(matrix, row) else matrix
    matrix[:, slot, :used] = row
    matrix[:, :used, slot] = column
    matrix[:, slot : slot + 1, slot : slot + 1] += added
    return matrix


def store_value(values: Tensor, age: int | Tensor, value: Tensor) -> Tensor:
    """A copy of values (B, m) with value (B,) for pair `age`."""
    if isinstance(age, Tensor):
        return torch.where(_slot(values, 1, age), value.unsqueeze(1), values)
    values = values.clone()
    values[:, age % values.shape[1]] = value
    return values


def identities(like: Tensor, size: int) -> Tensor:
    """(B, m, m): the identity for every row of `like` (B, D)."""
    matrix = like.new_zeros(like.shape[0], size, size)
    matrix.diagonal(dim1=1, dim2=2).fill_(1.0)
    return matrix


def in_use(buffer: Tensor, age: int | Tensor) -> Tensor:
    """The slots filled once `age` pairs are stored: (B, m, ...) -> (B, min(age, m), ...)."""
    return buffer if isinstance(age, Tensor) else buffer[:, : min(age, buffer.shape[1])]


def square_in_use(matrix: Tensor, age: int | Tensor) -> Tensor:
    """(B, m, m) -> (B, min(age, m), min(age, m))."""
    if isinstance(age, Tensor):
        return matrix
    used = min(age, matrix.shape[1])
    return matrix[:, :used, :used]


def newest(history: Tensor, age: int | Tensor) -> Tensor:
    """(B, D): pair `age`."""
    if isinstance(age, Tensor):
        return history.index_select(1, (age % history.shape[1]).reshape(1)).squeeze(1)
    return history[:, age % history.shape[1]]


def _slot(buffer: Tensor, dim: int, age: Tensor) -> Tensor:
    """Where pair `age` lies along a dimension: a choice fuses with its neighbours in a graph, an indexed copy does not."""
    here = torch.arange(buffer.shape[dim], device=buffer.device) == age % buffer.shape[dim]
    return here.view(-1, *[1] * (buffer.dim() - dim - 1))


def dots(history: Tensor, v: Tensor) -> Tensor:
    """(B, m, D), (B, D) -> (B, m): v times every row, in the dtype of v.

    As v Hᵀ, which a CPU does several times faster than H v. A history stored in fewer bits is read row by row, so that it
    never stands in memory in more.
    """
    if history.dtype != v.dtype:
        return torch.stack([torch.linalg.vecdot(row.to(v.dtype), v) for row in history.unbind(1)], dim=1)
    return torch.bmm(v.unsqueeze(1), history.mT).squeeze(1)


def both_dots(history: Tensor, v: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """`dots` of two vectors, in one pass over the rows."""
    if history.dtype != v.dtype:
        return dots(history, v), dots(history, w)
    of_v, of_w = torch.bmm(torch.stack((v, w), dim=1), history.mT).unbind(1)
    return of_v, of_w


def combine(base: Tensor, weights: Tensor, history: Tensor) -> Tensor:
    """(B, D), (B, m), (B, m, D) -> (B, D): base - Σ weightsᵢ historyᵢ, in the dtype of base."""
    if history.dtype != base.dtype:
        for weight, row in zip(weights.unbind(1), history.unbind(1), strict=True):
            base = torch.addcmul(base, weight.unsqueeze(1), row.to(base.dtype), value=-1)
        return base
    return torch.baddbmm(base.unsqueeze(1), weights.unsqueeze(1), history, alpha=-1.0).squeeze(1)


def inverse_of(length: Tensor) -> Tensor:
    """1 / length, and 0 where that is 0. Its derivative is 0 there too, not 0 times infinity."""
    if not recorded(length):
        return length.reciprocal().nan_to_num(nan=0.0, posinf=0.0)
    some = length > 0
    return torch.where(some, torch.where(some, length, 1.0).reciprocal(), 0.0)


# The small systems are kept scaled, D A D with D = diag(1 / lengths): pairs of very different length then count alike, and
# a ridge is relative. Where 1 / length stands as 0, the pair is left out: of a sample at rest, forgotten, or not in use.


def scaled(system: Tensor, inverse: Tensor, ridge: float = 0.0) -> Tensor:
    """D system D + ridge I for a system (B, m, m) and 1 / lengths (B, m), with 1 on the diagonal for pairs left out."""
    diagonal = torch.where(inverse > 0, ridge, 1.0).to(system.dtype)
    return system * (inverse.unsqueeze(1) * inverse.unsqueeze(2)) + torch.diag_embed(diagonal)


def solve_scaled(system: Tensor, rhs: Tensor, inverse: Tensor) -> Tensor:
    """x (B, m) with A x = rhs, from D A D. Samples whose system is singular get x = 0: they take a plain step."""
    solution = torch.linalg.solve_ex(system, (inverse * rhs).unsqueeze(2))[0].squeeze(2)
    # A zero on the diagonal of the factor divides, and a sum is not finite unless all its terms are.
    if solution.device.type != "cpu" or blind() or not isfinite(float(solution.detach().sum())):
        sound = solution.sum(dim=1, keepdim=True).abs() < torch.inf
        solution = solution.masked_fill(~sound, 0.0)
    return inverse * solution


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
