"""The small system of every sample: the products of its pairs of differences, in the slots of their ring buffers.

They are kept scaled, D A D with D = diag(1 / lengths): pairs of very different length then count alike, and
a ridge is relative. Where 1 / length stands as 0, the pair is left out: of a sample at rest, forgotten, or not in use.
"""

from __future__ import annotations

from math import isfinite

import torch
from torch import Tensor

from equilibria.kernels.history.ring import slot_of
from equilibria.transforms import blind, recorded


def inverse_of(length: Tensor) -> Tensor:
    """1 / length, and 0 where that is 0. Its derivative is 0 there too, not 0 times infinity."""
    if not recorded(length):
        return length.reciprocal().nan_to_num(nan=0.0, posinf=0.0)
    some = length > 0
    return torch.where(some, torch.where(some, length, 1.0).reciprocal(), 0.0)


def store_products(
    matrix: Tensor, age: int | Tensor, row: Tensor, column: Tensor, length: Tensor, ridge: float = 0.0
) -> Tensor:
    """matrix (B, m, m) with the products (B, used) of pair `age` and all pairs in use, and a ridge on the diagonal: in
    place, or as a copy where autograd records the solve or one graph holds it.

    A pair of length (B,) 0 has no products; with 1 on the diagonal the other pairs of its sample stay of use.
    """
    added = (length == 0).to(matrix.dtype).view(-1, 1, 1) if ridge == 0 else ridge
    if isinstance(age, Tensor):
        here, there = slot_of(matrix, 1, age), slot_of(matrix, 2, age)
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
        return torch.where(slot_of(values, 1, age), value.unsqueeze(1), values)
    values = values.clone()
    values[:, age % values.shape[1]] = value
    return values


def identities(like: Tensor, size: int) -> Tensor:
    """(B, m, m): the identity for every row of `like` (B, D)."""
    matrix = like.new_zeros(like.shape[0], size, size)
    matrix.diagonal(dim1=1, dim2=2).fill_(1.0)
    return matrix


def square_in_use(matrix: Tensor, age: int | Tensor) -> Tensor:
    """(B, m, m) -> (B, min(age, m), min(age, m))."""
    if isinstance(age, Tensor):
        return matrix
    used = min(age, matrix.shape[1])
    return matrix[:, :used, :used]


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
