"""Jacobian-vector products from reverse passes."""

from __future__ import annotations

import pytest
import torch
from problems import normal

from equilibria.iterate import BudgetedMap
from equilibria.products import linearize


def test_equals_forward_mode() -> None:
    W, z, v = normal(0, 3, 3), normal(1, 2, 3), normal(2, 2, 3)

    def f(z: torch.Tensor) -> torch.Tensor:
        return torch.tanh(z @ W)

    value, push = linearize(f, z)
    assert torch.equal(value, f(z))
    for direction in (v, -2 * v):  # as often as one likes
        assert torch.allclose(push(direction), direction @ W * (1 - value**2), rtol=1e-12)


def test_of_several_arguments() -> None:
    a, b, da, db = (normal(seed, 4) for seed in range(4))
    _, push = linearize(lambda a, b: a * b, a, b)
    assert torch.allclose(push(da, db), da * b + a * db, rtol=1e-13)


def test_is_differentiable() -> None:
    z, v = normal(0, 2, 3).requires_grad_(), normal(1, 2, 3)
    push = linearize(lambda z: z**3, z)[1]
    (gradient,) = torch.autograd.grad(push(v).sum(), z)
    assert torch.allclose(gradient, 6 * z * v, rtol=1e-13)


@pytest.mark.parametrize("grad", [torch.no_grad, torch.enable_grad])
def test_products_count_against_the_budget(grad: type[torch.no_grad]) -> None:
    with grad():
        f = BudgetedMap(lambda z, a: a * z, [torch.tensor(3.0)], 10, [None])
        value, push = f.linearize(torch.ones(1, 2))
        assert torch.equal(value, torch.full((1, 2), 3.0))
        assert torch.equal(push(torch.ones(1, 2)), torch.full((1, 2), 3.0))
        assert f.evaluations == 2
        f.rows(torch.tensor([0])).linearize(torch.ones(1, 2))[1](torch.ones(1, 2))
        assert f.evaluations == 4
        assert f.remaining == 6
