"""Injections that cannot blow up: their bounds as theorems about the equilibria they lead to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import normal, orthogonal
from steps import iterates
from torch import Tensor, nn

from equilibria import DEQ, Implicit, Picard, Stopping
from equilibria.nn import BoundedInjection, DecayInjection

TIGHT = Stopping(rtol=1e-13, atol=1e-15, max_evals=400)


class TestBoundedInjection:
    @pytest.mark.parametrize("bound", [0.5, 2.0])
    def test_never_stretches_by_more_than_the_bound(self, bound: float) -> None:
        torch.manual_seed(0)
        inject: Any = BoundedInjection(5, 7, bound=bound).double()
        with torch.no_grad():
            inject.parametrizations.weight.original.mul_(100.0)
        x, y = normal(0, 200, 5), normal(1, 200, 5)
        stretched = (inject(x) - inject(y)).norm(dim=1) / (x - y).norm(dim=1)
        assert stretched.max() <= bound * (1 + 1e-6)
        assert abs(torch.linalg.matrix_norm(inject.weight, 2).item() - bound) < 1e-6 * bound

    def test_equilibria_move_no_further_than_the_theorem_allows(self) -> None:
        """‖z*(x) - z*(y)‖ <= bound / (1 - L) ‖x - y‖ for a map that contracts at rate L."""

        class Block(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inject = BoundedInjection(3, 4, bound=0.5).double()
                self.W = 0.6 * orthogonal(4)

            def prepare(self, x: Tensor) -> tuple[Tensor]:
                return (self.inject(x),)

            def initial(self, x: Tensor) -> Tensor:
                return x.new_zeros(len(x), 4)

            def forward(self, z: Tensor, u: Tensor) -> Tensor:
                return torch.tanh(z @ self.W.T + u)

        torch.manual_seed(0)
        deq = DEQ(Block(), stopping=TIGHT).eval()
        x, y = normal(0, 50, 3), normal(1, 50, 3)
        moved = (deq(x).z - deq(y).z).norm(dim=1)
        assert (moved <= 0.5 / (1 - 0.6) * (x - y).norm(dim=1) * (1 + 1e-6)).all()

    def test_is_a_linear_layer(self) -> None:
        assert isinstance(BoundedInjection(3, 4), nn.Linear)
        assert BoundedInjection(3, 4, bias=False).bias is None
        with pytest.raises(ValueError, match="bound is -1"):
            BoundedInjection(3, 4, bound=-1)


class TestDecayInjection:
    def test_its_equilibrium_is_known(self) -> None:
        torch.manual_seed(0)
        inject = DecayInjection(3, 4, step=0.7).double()
        with torch.no_grad():
            inject.log_rate.copy_(normal(1, 4))
        x = normal(0, 5, 3).requires_grad_()
        z, stats = DEQ(inject, stopping=TIGHT, adjoint=Implicit(stopping=TIGHT))(x)
        decay = torch.exp(-0.7 * inject.log_rate.exp())
        expected = 0.7 * (x @ inject.linear.weight.T) / (1 - decay)
        assert stats.converged.all()
        assert torch.allclose(z, expected, rtol=1e-10)
        parameters = [inject.linear.weight, inject.log_rate, x]
        found = torch.autograd.grad(z.square().sum(), parameters)
        for a, b in zip(found, torch.autograd.grad(expected.square().sum(), parameters), strict=True):
            assert torch.allclose(a, b, rtol=1e-8)

    @pytest.mark.parametrize("rate", [-3.0, 0.0, 3.0])
    def test_is_stable_whatever_is_learned(self, rate: float) -> None:
        """Picard's rate is the largest decay, below 1."""
        inject = DecayInjection(3, 4, step=0.5).double()
        nn.init.constant_(inject.log_rate, rate)
        with torch.no_grad():
            a, injected = inject.prepare(normal(0, 2, 3))
            visited = iterates(Picard(), lambda z: inject(z, a, injected), normal(1, 2, 4), 6)
        assert (a > 0).all()
        assert (a < 1).all()
        assert torch.allclose(a, torch.exp(torch.tensor(-0.5 * torch.e**rate, dtype=torch.float64)).expand(4))
        first, second = visited[1] - visited[0], visited[2] - visited[1]
        assert torch.allclose(second, a * first, rtol=1e-9, atol=1e-12)

    def test_any_leading_dimensions(self) -> None:
        inject = DecayInjection(3, 4)
        z, _ = DEQ(inject)(torch.randn(2, 6, 3))
        assert z.shape == (2, 6, 4)

    @pytest.mark.parametrize("step", [0.0, -1.0, float("inf"), float("nan")])
    def test_impossible_step(self, step: float) -> None:
        with pytest.raises(ValueError, match="must be above 0 and finite"):
            DecayInjection(3, 4, step=step)
