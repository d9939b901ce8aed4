"""Maps whose fixed points are known, for the tests of every solver and every adjoint.

A problem is built for a batch size, a trailing shape and a dtype. Its args are drawn in float64 and rounded to that dtype
first, so that `exact` is the fixed point of the very map that is solved, to float64 rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten


@dataclass(frozen=True)
class Problem:
    """z* = f(z*, *args), and what is known of it."""

    f: Callable[..., Any]
    z0: Any
    args: tuple[Any, ...]
    exact: Any
    """z* in float64, in the structure of z0."""
    condition: float
    """max over samples of ‖(I - J)⁻¹‖₂ at z*: to first order, ‖z - z*‖ <= condition · ‖f(z) - z‖."""
    batch_dims: tuple[int | None, ...]
    affine: bool = False
    picard: bool = True
    """Whether plain fixed-point iteration converges."""


class Counted:
    """f, with the calls made of it and the rows (samples) evaluated in them."""

    def __init__(self, f: Callable[..., Any]) -> None:
        self.f = f
        self.calls = 0
        self.rows = 0

    def __call__(self, z: Any, *args: Any) -> Any:
        self.calls += 1
        self.rows += len(tree_flatten(z)[0][0])
        return self.f(z, *args)


def flat(state: Any) -> Tensor:
    """(B, D): a state as a matrix, a sample in each row."""
    return torch.cat([leaf.reshape(len(leaf), -1) for leaf in tree_flatten(state)[0]], dim=1)


def residual_of(f: Callable[..., Any], z: Any, *args: Any) -> Tensor:
    """(B, D): f(z) - z, in float32 at least."""
    dtype = torch.promote_types(flat(z).dtype, torch.float32)
    return flat(f(z, *args)).to(dtype) - flat(z).to(dtype)


def double(tree: Any) -> Any:
    return tree_map(lambda leaf: leaf.double() if isinstance(leaf, Tensor) else leaf, tree)


def jacobian(f: Callable[..., Any], z: Any, *args: Any) -> Tensor:
    """(B, D, D): ∂f/∂z of every sample."""
    with torch.enable_grad():
        leaves, spec = tree_flatten(z)
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        out = flat(f(tree_unflatten(leaves, spec), *args))
        rows = [
            flat(torch.autograd.grad(column.sum(), leaves, retain_graph=True, materialize_grads=True)) for column in out.T
        ]
    return torch.stack(rows, dim=1)


def solve_exactly(f: Callable[..., Any], z0: Any, args: tuple[Any, ...]) -> tuple[Any, float]:
    """(z*, condition) in float64: damped Picard steps to come near, then Newton's method. An affine f needs one step."""
    z, args = double(z0), double(args)
    leaves, spec = tree_flatten(z)
    for _ in range(100):
        z = tree_map(lambda z, fz: z + 0.4 * (fz - z), z, f(z, *args))
    for _ in range(8):
        system = jacobian(f, z, *args) - torch.eye(flat(z).shape[1], dtype=torch.float64)
        change = torch.linalg.solve(system, residual_of(f, z, *args))
        parts = change.split([prod(leaf.shape[1:]) for leaf in leaves], dim=1)
        z = tree_unflatten(
            [old - part.reshape(old.shape) for old, part in zip(tree_flatten(z)[0], parts, strict=True)], spec
        )
    assert residual_of(f, z, *args).abs().max() <= 1e-13 * (1 + flat(z).abs().max())
    inverse = torch.linalg.inv(torch.eye(flat(z).shape[1], dtype=torch.float64) - jacobian(f, z, *args))
    return z, float(torch.linalg.matrix_norm(inverse, ord=2).max())


def build(f: Callable[..., Any], z0: Any, args: tuple[Any, ...], dtype: torch.dtype, dims: tuple[int | None, ...],
          *, affine: bool = False, picard: bool = True) -> Problem:  # fmt: skip
    """The problem with z0 and args rounded to `dtype`."""
    z0, args = tree_map(lambda leaf: leaf.to(dtype), (z0, args))
    exact, condition = solve_exactly(f, z0, args)
    return Problem(f, z0, args, exact, condition, dims, affine=affine, picard=picard)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthogonal(size: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(normal(seed, size, size))[0]


def matmul(W: Tensor, z: Tensor) -> Tensor:
    """W z for every sample, over all trailing dimensions of z at once."""
    return (z.reshape(len(z), -1) @ W.mT).reshape(z.shape)


def normal_matrix(real: Tensor, rotations: tuple[tuple[float, float], ...] = ()) -> Tensor:
    """A normal matrix with the real eigenvalues given and, for each (radius, angle), the pair radius · e^(± i angle)."""
    blocks = [torch.diag(real.double())] if len(real) else []
    for radius, angle in rotations:
        a = torch.tensor(angle, dtype=torch.float64)
        blocks.append(radius * torch.stack([torch.stack([a.cos(), -a.sin()]), torch.stack([a.sin(), a.cos()])]))
    diagonal = torch.block_diag(*blocks)
    basis = orthogonal(len(diagonal))
    return basis @ diagonal @ basis.T


def affine_map(z: Tensor, A: Tensor, b: Tensor) -> Tensor:
    return matmul(A, z) + b


def tanh_map(z: Tensor, W: Tensor, x: Tensor) -> Tensor:
    return torch.tanh(matmul(W, z) + x)


def homogeneous_map(z: Tensor, W: Tensor) -> Tensor:
    return torch.tanh(matmul(W, z))


def cosine_map(z: Tensor) -> Tensor:
    return torch.cos(z)


def diagonal_map(z: Tensor, rates: Tensor, b: Tensor) -> Tensor:
    return rates * z + b


def nested_map(z: dict[str, Any], W: Tensor, x: Tensor) -> dict[str, Any]:
    wide, (narrow,) = z["wide"], z["rest"]
    mean = narrow.mean(1).reshape(-1, *(1,) * (wide.dim() - 1))
    return {
        "wide": torch.tanh(0.5 * matmul(W, wide) + 0.3 * mean + x),
        "rest": (torch.sin(0.4 * narrow + 0.2 * wide.reshape(len(wide), -1).mean(1, keepdim=True)) + 0.5,),
    }


def affine(batch: int, shape: tuple[int, ...], dtype: torch.dtype) -> Problem:
    """Eigenvalues from -0.7 to 0.6, and, where there is room, a rotation by 2 rad that shrinks by 0.8."""
    size = prod(shape)
    several = size > 1
    A = normal_matrix(torch.linspace(-0.7, 0.6, size - 2 * several), rotations=((0.8, 2.0),) * several)
    return build(affine_map, torch.zeros(batch, *shape), (A, normal(1, batch, *shape)), dtype, (None, 0), affine=True)


def tanh_contraction(batch: int, shape: tuple[int, ...], dtype: torch.dtype) -> Problem:
    W = 0.7 * orthogonal(prod(shape))
    return build(tanh_map, normal(3, batch, *shape), (W, normal(2, batch, *shape)), dtype, (None, 0))


def tanh_expansion(batch: int, shape: tuple[int, ...], dtype: torch.dtype) -> Problem:
    """W orthogonal times 1.2, no contraction: a quarter turn in every plane, and -1 on the odd dimension left over.

    With D the slopes of tanh, I - D W is invertible, for the symmetric part of D⁻¹ - W is at least I; so there is one
    fixed point.
    """
    size = prod(shape)
    turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)
    W = -torch.eye(size, dtype=torch.float64)
    for i in range(0, size - 1, 2):
        W[i : i + 2, i : i + 2] = turn
    basis = orthogonal(size)
    W = 1.2 * basis @ W @ basis.T
    x = 0.3 * normal(4, batch, *shape)
    return build(tanh_map, torch.zeros(batch, *shape), (W, x), dtype, (None, 0), picard=False)


def cosine(batch: int, shape: tuple[int, ...], dtype: torch.dtype) -> Problem:
    """z* = 0.739085..., the same for all."""
    return build(cosine_map, normal(5, batch, *shape), (), dtype, ())


def nested(batch: int, shape: tuple[int, ...], dtype: torch.dtype) -> Problem:
    z0 = {"wide": torch.zeros(batch, *shape), "rest": (torch.ones(batch, 3),)}
    return build(nested_map, z0, (orthogonal(prod(shape)), normal(6, batch, *shape)), dtype, (None, 0))


def one_hard(batch: int, shape: tuple[int, ...], dtype: torch.dtype) -> Problem:
    """The middle sample contracts by 0.95 only, all others by 0.2; z* = b / (1 - rate)."""
    size = prod(shape)
    rates = torch.linspace(0.1, 0.2, size).expand(batch, size).clone()
    rates[batch // 2] = torch.linspace(-0.95, 0.95, size) if size > 1 else 0.95
    args = (rates.reshape(batch, *shape), normal(7, batch, *shape))
    return build(diagonal_map, torch.zeros(batch, *shape), args, dtype, (0, 0), affine=True)


def zero(batch: int, shape: tuple[int, ...], dtype: torch.dtype) -> Problem:
    """z* = 0, where only the absolute tolerance can be met."""
    return build(homogeneous_map, normal(8, batch, *shape), (0.8 * orthogonal(prod(shape)),), dtype, (None,))


def affine_zero(batch: int, shape: tuple[int, ...], dtype: torch.dtype) -> Problem:
    size = prod(shape)
    A = normal_matrix(torch.linspace(-0.7, 0.6, size))
    args = (A, torch.zeros(batch, *shape))
    return build(affine_map, normal(9, batch, *shape), args, dtype, (None, 0), affine=True)


PROBLEMS: dict[str, Callable[[int, tuple[int, ...], torch.dtype], Problem]] = {
    make.__name__: make for make in (affine, tanh_contraction, tanh_expansion, cosine, nested, one_hard, zero, affine_zero)
}
