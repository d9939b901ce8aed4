"""A deep equilibrium layer in five lines, and whether its gradient is right.

A deep network applies many layers, z_{k+1} = f_k(z_k, x). With one layer f, repeated until nothing moves any more, the
output is the fixed point z* = f(z*, x): a network of any depth with the parameters of one layer. Its gradient needs none of
the steps that were taken, for z* satisfies an equation, and differentiating that (the implicit function theorem) gives

    dz*/dθ = (I - ∂f/∂z)⁻¹ ∂f/∂θ,

which costs one linear solve. Here the gradient of a loss is had in three ways that share nothing: by this theorem, by
backpropagation through a hundred unrolled steps, and by moving the parameters a little and solving again.

    python examples/layer.py
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import tyro
from torch import Tensor

from equilibria import Stopping, fixed_point


def f(z: Tensor, W: Tensor, U: Tensor, x: Tensor) -> Tensor:
    return torch.tanh(z @ W + x @ U)


def layer(x: Tensor, W: Tensor, U: Tensor) -> Tensor:
    return fixed_point(f, x.new_zeros(len(x), len(W)), W, U, x, stopping=Stopping(rtol=1e-12)).z


def deep_network(x: Tensor, W: Tensor, U: Tensor, depth: int = 100) -> Tensor:
    """The same by plain repetition, which autograd records step by step."""
    z = x.new_zeros(len(x), len(W))
    for _ in range(depth):
        z = f(z, W, U, x)
    return z


class Result(NamedTuple):
    """∂loss/∂W along a random direction, had in three ways, and how far the second and the third are from the first."""

    implicit: float
    unrolled: float
    finite_difference: float
    worst: float


def main(width: int = 16, batch: int = 8, seed: int = 0) -> Result:
    """Compare three gradients of one loss.

    Args:
        width: numbers in the state of a sample.
        batch: samples.
        seed: of parameters, inputs and the direction.
    """
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    W = (0.4 * width**-0.5 * normal(width, width)).requires_grad_()  # small: then f contracts, and z* is unique
    U, x, direction = normal(5, width), normal(batch, 5), normal(width, width)

    def loss(z: Tensor) -> Tensor:
        return z.square().mean()

    def slope(z: Tensor) -> float:
        return float((torch.autograd.grad(loss(z), W)[0] * direction).sum())

    implicit, unrolled = slope(layer(x, W, U)), slope(deep_network(x, W, U))
    with torch.no_grad():
        step = 1e-5 * direction
        finite = float(loss(layer(x, W + step, U)) - loss(layer(x, W - step, U))) / 2e-5
    worst = max(abs(unrolled - implicit), abs(finite - implicit)) / abs(implicit)
    print(f"by the implicit function theorem  {implicit:+.10f}")
    print(f"by unrolling 100 steps            {unrolled:+.10f}")
    print(f"by finite differences             {finite:+.10f}")
    print(f"largest relative difference       {worst:.0e}")
    if not worst < 1e-3:
        raise RuntimeError(f"the gradients differ by {worst:.0e}")
    return Result(implicit, unrolled, finite, worst)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
