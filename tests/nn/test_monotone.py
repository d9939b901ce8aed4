"""Monotone weights, and the equilibrium that they guarantee."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from problems import jacobian, normal
from torch import Tensor, nn

from equilibria import DEQ, Anderson, Implicit, NewtonKrylov, Stopping, fixed_point
from equilibria.nn import MonotoneBlock, MonotoneDEQ, monotone

TIGHT = Stopping(rtol=1e-11, atol=1e-13, max_evals=3000)
X = normal(0, 5, 3)


def block_of(scale: float, margin: float = 0.2, size: int = 6) -> MonotoneBlock:
    """With random A and B of the size given."""
    block = MonotoneBlock(3, size, margin=margin).double()
    with torch.no_grad():
        for seed, parameter in enumerate(block.parameters()):
            parameter.copy_(normal(seed + 1, *parameter.shape))
        for parameter in block.inner.parameters():
            parameter.mul_(scale)
    return block


def deq_of(block: MonotoneBlock, **options: Any) -> MonotoneDEQ:
    return MonotoneDEQ(block, stopping=TIGHT, adjoint=Implicit(stopping=TIGHT), **options)


class TestWeight:
    @pytest.mark.parametrize("scale", [0.0, 0.1, 1.0, 30.0])
    @pytest.mark.parametrize("margin", [0.01, 0.5, 2.0])
    def test_is_monotone_whatever_the_parameters(self, scale: float, margin: float) -> None:
        W = block_of(scale, margin).inner.weight.detach()
        least = torch.linalg.eigvalsh(2 * torch.eye(6).double() - W - W.T).min()
        assert least >= 2 * margin - 1e-12 * (1 + float(W.norm()) ** 2)

    def test_a_monotone_weight_is_kept(self) -> None:
        A, B = normal(1, 5, 5), normal(2, 5, 5)
        W = 0.7 * torch.eye(5).double() - A.T @ A + B - B.T
        linear = nn.Linear(5, 5).double()
        linear.weight.data.copy_(W)
        assert torch.allclose(monotone(linear, margin=0.3).weight, W, rtol=1e-12, atol=1e-12)

    def test_another_weight_is_replaced_by_the_nearest(self) -> None:
        """No monotone weight lies on the far side of the plane through the nearest one, P, at right angles to W - P."""
        W = 3 * normal(3, 5, 5)
        linear = monotone(nn.Linear(5, 5).double(), margin=0.3)
        linear.weight = W
        P = linear.weight
        assert (W - P).norm() > 0.1
        for seed in range(20):
            A, B = normal(seed, 5, 5), normal(seed + 100, 5, 5)
            Q = 0.7 * torch.eye(5).double() - A.T @ A + B - B.T
            assert ((W - P) * (Q - P)).sum() <= 1e-12
            near = P + 0.1 * (Q - P)
            assert (W - near).norm() >= (W - P).norm() - 1e-12

    def test_has_two_parameters(self) -> None:
        names = {name for name, _ in monotone(nn.Linear(4, 4), margin=0.4).named_parameters()}
        assert names == {"bias", "parametrizations.weight.original0", "parametrizations.weight.original1"}

    @pytest.mark.parametrize(
        ("make", "words"),
        [
            (lambda: monotone(nn.Linear(3, 4)), r"Linear.weight must be a tensor of shape \(D, D\); there is .*\(4, 3\)"),
            (lambda: monotone(nn.Linear(3, 3), "kernel"), r"Linear.kernel must be a tensor .*; there is none"),
            (lambda: monotone(nn.Linear(3, 3), margin=0.0), "margin is 0.0; it must be a finite number above 0"),
            (lambda: MonotoneBlock(3, 4, margin=float("nan")), "margin is nan"),
        ],
    )
    def test_misuse(self, make: Any, words: str) -> None:
        with pytest.raises(ValueError, match=words):
            make()


class TestEquilibrium:
    @pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
    @pytest.mark.parametrize("size", [1, 6, 25])
    def test_exists_and_is_unique(self, scale: float, size: int) -> None:
        """Also where the weight is hundreds in norm; two starts lead to the same, and so does another solver."""
        block = block_of(scale, size=size)
        deq = deq_of(block, alpha=min(1.0, 1 / scale**2))
        z, stats = deq(X)
        again, again_stats = deq(X, z0=50 * normal(9, 5, size))
        newton, newton_stats = DEQ(block, solver=NewtonKrylov(max_krylov=40), stopping=TIGHT)(X)
        for found in (stats, again_stats, newton_stats):
            assert found.converged.all()
        weight, bias = block.prepare(X)
        assert (z - torch.relu(z @ weight.T + bias)).abs().max() < 1e-9 * (1 + float(z.detach().abs().max()))
        assert torch.allclose(z, again, rtol=1e-7, atol=1e-8)
        assert torch.allclose(z, newton, rtol=1e-7, atol=1e-8)

    @pytest.mark.parametrize("activation", [torch.tanh, torch.sigmoid, nn.functional.softplus])
    def test_is_unique_for_other_nonlinearities(self, activation: Any) -> None:
        W, c = block_of(2.0).inner.weight.detach(), 3 * normal(4, 5, 6)
        solve = [
            fixed_point(lambda z: activation(z @ W.T + c), start, solver=NewtonKrylov(line_search=20), stopping=TIGHT)
            for start in (torch.zeros(5, 6).double(), normal(5, 5, 6))
        ]
        assert all(bool(solution.stats.converged.all()) for solution in solve)
        assert torch.allclose(solve[0].z, solve[1].z, rtol=1e-8, atol=1e-9)

    @pytest.mark.parametrize("margin", [0.05, 0.5])
    def test_moves_by_no_more_than_the_bias_over_the_margin(self, margin: float) -> None:
        block = block_of(1.0, margin)
        weight, bias = (value.detach() for value in block.prepare(X))

        def layer(c: Tensor) -> Tensor:
            return deq_of(block).solve(torch.zeros(5, 6).double(), weight, c).z

        slopes = jacobian(layer, bias)
        assert torch.linalg.matrix_norm(slopes, ord=2).max() <= 1 / margin
        other = bias + normal(6, 5, 6)
        assert ((layer(other) - layer(bias)).norm(dim=1) <= (other - bias).norm(dim=1) / margin).all()

    def test_gradients_are_those_of_finite_differences(self) -> None:
        block = block_of(0.7, size=4)
        deq = deq_of(block)
        names = [name for name, _ in deq.named_parameters()]
        assert len(names) == 4

        def layer(x: Tensor, *parameters: Tensor) -> Tensor:
            return torch.func.functional_call(deq, dict(zip(names, parameters, strict=True)), (x,)).z

        inputs = (X.clone().requires_grad_(), *(p.detach().clone().requires_grad_() for p in deq.parameters()))
        assert torch.autograd.gradcheck(layer, inputs)

    def test_gradients_are_those_of_any_solver(self) -> None:
        block = block_of(0.3)
        gradients = []
        for deq in (deq_of(block), DEQ(block, solver=Anderson(), stopping=TIGHT, adjoint=Implicit(stopping=TIGHT))):
            z, stats = deq(X)
            assert stats.converged.all()
            gradients.append(torch.autograd.grad(z.square().sum(), list(block.parameters())))
        for mine, theirs in zip(*gradients, strict=True):
            assert mine.abs().max() > 1e-3
            assert torch.allclose(mine, theirs, rtol=1e-7, atol=1e-9)

    def test_stays_solvable_however_it_is_trained(self) -> None:
        """Steps that are far too long: the weight grows, and every solve still converges."""
        block = block_of(0.5)
        deq = deq_of(block, alpha=0.1)
        optimizer = torch.optim.SGD(deq.parameters(), lr=0.3)
        target, losses = normal(7, 5, 6).abs(), []
        for _ in range(25):
            z, stats = deq(X)
            assert stats.converged.all()
            loss = (z - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert min(losses) < 0.5 * losses[0]


class TestModule:
    def test_evaluation_has_a_stopping_of_its_own(self) -> None:
        deq = MonotoneDEQ(block_of(0.5), stopping=TIGHT, eval_stopping=Stopping(rtol=1e-2))
        assert deq.train()(X).stats.evaluations > deq.eval()(X).stats.evaluations

    def test_easy_samples_leave_the_batch(self) -> None:
        sizes: list[int] = []

        class Watched(MonotoneBlock):
            def forward(self, z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
                sizes.append(len(z))
                return super().forward(z, weight, bias)

        torch.manual_seed(0)
        block = Watched(3, 6).double()
        with torch.no_grad():
            block.outer.weight.copy_(normal(1, 6, 3))
            block.outer.bias.zero_()
        x = 0 * X
        x[2] = X[2]
        z, stats = deq_of(block)(x)
        assert stats.converged.all()
        assert min(sizes) == 1
        assert torch.allclose(z[2:3], deq_of(block)(x[2:3]).z, rtol=1e-9, atol=1e-11)

    def test_autocast_leaves_the_guarantee_alone(self) -> None:
        block = block_of(0.5).float()
        weight = block.inner.weight
        deq = MonotoneDEQ(block, stopping=Stopping(rtol=1e-5, max_evals=300))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(block.inner.weight, weight)
            z, stats = deq(X.float())
        assert stats.converged.all()
        assert z.dtype == torch.float32
        z.sum().backward()

    def test_can_be_copied_and_restored(self) -> None:
        deq = deq_of(block_of(0.5))
        z = deq(X).z
        z.sum().backward()
        twin = copy.deepcopy(deq)
        assert torch.equal(twin(X).z, z)
        fresh = deq_of(MonotoneBlock(3, 6, margin=0.2).double())
        fresh.load_state_dict(deq.state_dict())
        assert torch.equal(fresh(X).z, z)

    def test_torch_func(self) -> None:
        deq = deq_of(block_of(0.5))
        parameters = {name: p.detach() for name, p in deq.named_parameters()}

        def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
            return torch.func.functional_call(deq, parameters, (x,)).z.square().sum()

        found = torch.func.grad(loss)(parameters, X)
        expected = torch.autograd.grad(deq(X).z.square().sum(), list(deq.parameters()))
        for name, gradient in zip(parameters, expected, strict=True):
            assert torch.allclose(found[name], gradient, rtol=1e-9, atol=1e-12)
        with pytest.raises(ValueError, match=r"Under torch.vmap .* pass the larger batch yourself"):
            torch.vmap(lambda x: loss(parameters, x))(torch.stack([X, 2 * X]))

    def test_needs_a_weight_and_a_bias(self) -> None:
        class Other(nn.Module):
            def forward(self, z: Tensor, x: Tensor) -> Tensor:
                return 0.5 * z + x

        with pytest.raises(TypeError, match=r"prepare returns \(W, c\).* that of Other returned 1 args"):
            MonotoneDEQ(Other())(X)
