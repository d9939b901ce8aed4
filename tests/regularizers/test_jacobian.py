"""The Jacobian loss against Jacobians that are known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from equilibria.models import DEQTransformerLM, TransformerConfig
from equilibria.regularizers import jacobian_loss


def linear(z: Tensor, a: Tensor) -> Tensor:
    return z @ a.T


def test_its_mean_is_the_squared_frobenius_norm_per_entry() -> None:
    draw = torch.Generator().manual_seed(0)
    a = torch.randn(6, 6, generator=draw, dtype=torch.float64)
    z = torch.zeros(20_000, 6, dtype=torch.float64)  # every sample is a draw of its own
    expected = a.square().sum() / 6
    estimate = jacobian_loss(linear, z, a, generator=draw)
    assert estimate.item() == pytest.approx(expected.item(), rel=0.03)  # standard deviation of the mean: under 1 %


def test_its_gradient_is_that_of_the_norm() -> None:
    draw = torch.Generator().manual_seed(0)
    a = torch.randn(6, 6, generator=draw, dtype=torch.float64, requires_grad=True)
    z = torch.zeros(50_000, 6, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(jacobian_loss(linear, z, a, generator=draw), a)
    torch.testing.assert_close(gradient, 2 * a.detach() / 6, rtol=0.0, atol=0.05)


def test_the_point_is_constant_and_the_module_learns() -> None:
    layer = nn.Linear(4, 4)
    z = torch.randn(3, 4, requires_grad=True)
    loss = jacobian_loss(lambda z: torch.tanh(layer(z)), z)
    loss.backward()
    assert z.grad is None
    assert layer.weight.grad is not None
    assert layer.weight.grad.abs().max() > 0


def test_a_descent_step_shrinks_the_jacobian() -> None:
    torch.manual_seed(0)
    model = DEQTransformerLM(TransformerConfig(vocab_size=11, d_model=16, n_head=2, d_inner=32, mem_len=0))
    tokens = torch.randint(11, (8, 12))
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    seen = []
    for _ in range(20):
        loss = model(tokens, tokens, jacobian=True).jacobian
        assert loss is not None
        loss.backward()
        sgd.step()
        sgd.zero_grad()
        seen.append(loss.item())
    assert sum(seen[-5:]) < 0.8 * sum(seen[:5])


def test_a_model_gives_it_only_where_asked_and_solved() -> None:
    model = DEQTransformerLM(TransformerConfig(vocab_size=11, d_model=16, n_head=2, d_inner=32, subseq_len=3))
    tokens = torch.randint(11, (2, 7))
    assert model(tokens, tokens).jacobian is None
    assert model(tokens, tokens, jacobian=True, depth=2).jacobian is None
    penalty = model(tokens, tokens, jacobian=True).jacobian
    assert penalty is not None
    assert penalty.dim() == 0
