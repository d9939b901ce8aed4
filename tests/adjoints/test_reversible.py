"""The reversible adjoint: exactly the gradient that unrolling has, in memory that does not grow, or an error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import PROBLEMS, Counted, normal, orthogonal, tanh_map
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from equilibria import (
    DEQ,
    Anderson,
    ReconstructionError,
    Reversible,
    ReversiblePicard,
    Stopping,
    Unrolled,
    fixed_point,
)

PICARD = ReversiblePicard()


def gradients(f: Any, z0: Any, args: tuple[Tensor, ...], adjoint: Any, **options: Any) -> tuple[list[Tensor], Any]:
    leaves, _ = tree_flatten((z0, args))
    z, stats = fixed_point(f, z0, *args, adjoint=adjoint, **{"solver": PICARD, **options})
    loss = sum((leaf * normal(i, *leaf.shape).to(leaf.dtype)).sum() for i, leaf in enumerate(tree_flatten(z)[0]))
    assert isinstance(loss, Tensor)
    return list(torch.autograd.grad(loss, leaves)), (z, stats)


class TestExactness:
    @pytest.mark.parametrize("budget", [2, 3, 10, 20, 40])
    @pytest.mark.parametrize("damping", [0.2, 0.5])
    def test_equals_unrolled_though_not_converged(self, budget: int, damping: float) -> None:
        """To the rounding that the way back multiplies: by at most 1 / (1 - damping) for each step undone."""
        W, x = (0.9 * orthogonal(4)).requires_grad_(), normal(0, 3, 4).requires_grad_()
        z0 = normal(1, 3, 4).requires_grad_()
        options = {"stopping": Stopping(rtol=0, max_evals=budget), "solver": ReversiblePicard(damping=damping)}
        one, (z, stats) = gradients(tanh_map, z0, (W, x), Reversible(), **options)
        other, (z_other, _) = gradients(tanh_map, z0, (W, x), Unrolled(), **options)
        assert torch.equal(z, z_other)
        assert stats.evaluations == budget
        growth = (1 - damping) ** -budget
        for a, b in zip(one, other, strict=True):
            assert float((a - b).abs().max()) <= 1e-15 * growth * float(b.abs().max()) + 1e-14
        if budget <= 20:
            assert growth <= 2**20  # so that the bound above says at least 9 digits

    @pytest.mark.parametrize(("damping", "most"), [(0.2, 124), (0.5, 40), (0.8, 18)])
    @pytest.mark.parametrize("grad", [True, False])
    def test_takes_no_more_steps_than_can_be_undone(self, damping: float, most: int, grad: bool) -> None:
        """In training as in evaluation; what is left of 16 digits is enough."""
        x = torch.ones(2, 3, requires_grad=True)
        options: Any = {"solver": ReversiblePicard(damping=damping), "stopping": Stopping(rtol=1e-9, max_evals=1000)}
        with torch.set_grad_enabled(grad):
            z, stats = fixed_point(lambda z, x: 0.999 * z + x, torch.zeros(2, 3), x, adjoint=Reversible(), **options)
        assert stats.evaluations == most
        if grad:
            z.sum().backward()

    def test_of_z0_itself(self) -> None:
        z0, x = normal(1, 3, 4).requires_grad_(), normal(0, 3, 4).requires_grad_()
        stopping = Stopping(rtol=0, max_evals=1)
        z = fixed_point(tanh_map, z0, 0.5 * orthogonal(4), x, solver=PICARD, stopping=stopping, adjoint=Reversible()).z
        of_z0, of_x = torch.autograd.grad(z.sum(), (z0, x), allow_unused=True)
        assert torch.equal(of_z0, torch.ones_like(z0))
        assert of_x is None

    @pytest.mark.parametrize("name", ["tanh_contraction", "nested", "one_hard"])
    def test_samples_that_stop_at_different_steps(self, name: str) -> None:
        problem = PROBLEMS[name](5, (3,), torch.float64)
        z0, args = tree_map(lambda t: t.clone().requires_grad_(), (problem.z0, problem.args))
        stopping = Stopping(rtol=1e-4, max_evals=40)
        one, (_, stats) = gradients(problem.f, z0, args, Reversible(), stopping=stopping)
        other, _ = gradients(problem.f, z0, args, Unrolled(), stopping=stopping)
        assert len(set(stats.steps.tolist())) > 1
        for a, b in zip(one, other, strict=True):
            assert torch.allclose(a, b, rtol=1e-6, atol=1e-6)

    def test_float32_has_the_precision_of_float32(self) -> None:
        """The iterates are float64, so that what is lost on the way back is not lost from float32's seven digits."""
        W, x = (0.9 * orthogonal(4)).float().requires_grad_(), normal(0, 3, 4).float().requires_grad_()
        z0 = torch.zeros(3, 4, requires_grad=True)
        stopping = Stopping(rtol=1e-5, max_evals=40)
        one, (_, stats) = gradients(tanh_map, z0, (W, x), Reversible(), stopping=stopping)
        other, _ = gradients(tanh_map, z0, (W, x), Unrolled(), stopping=stopping)
        assert stats.evaluations > 20
        for a, b in zip(one, other, strict=True):
            assert a.dtype == torch.float32
            assert torch.allclose(a, b, rtol=2e-5, atol=1e-5)


def held(adjoint: Any, budget: int) -> int:
    """Bytes that autograd saves for the backward pass of a solve that spends its budget."""
    W, x = (0.9 * orthogonal(4)).requires_grad_(), normal(0, 3, 4).requires_grad_()
    sizes: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        kept.append(t)
        return t

    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        options = {"solver": PICARD, "stopping": Stopping(rtol=0, max_evals=budget), "adjoint": adjoint}
        fixed_point(tanh_map, torch.zeros(3, 4).double(), W, x, **options)
    return sum(sizes.values())


def test_memory_does_not_grow_with_the_steps() -> None:
    assert held(Reversible(), 10) == held(Reversible(), 40)
    assert held(Unrolled(), 40) > 3 * held(Unrolled(), 10) > held(Reversible(), 10)


def test_costs_an_evaluation_for_each_step() -> None:
    f = Counted(lambda z, x: 0.5 * z + x)
    x = torch.ones(2, 3, requires_grad=True)
    z, stats = fixed_point(f, torch.zeros(2, 3), x, solver=PICARD, adjoint=Reversible())
    assert f.calls == stats.evaluations
    z.sum().backward()
    assert f.calls == stats.evaluations + int(stats.steps.max())


class TestRefuses:
    def test_a_way_back_that_is_lost(self) -> None:
        W, x = (0.9 * orthogonal(4)).requires_grad_(), normal(0, 3, 4)
        options: Any = {"solver": ReversiblePicard(damping=0.9), "stopping": Stopping(rtol=0, atol=0, max_evals=60)}
        z, _ = fixed_point(tanh_map, torch.zeros(3, 4).double(), W, x, adjoint=Reversible(tolerance=1e-12), **options)
        with pytest.raises(ReconstructionError, match=r"undid \d+ steps and missed z0 by .* smaller damping than 0.9"):
            z.sum().backward()

    def test_another_solver(self) -> None:
        x = torch.ones(2, 3, requires_grad=True)
        with pytest.raises(ValueError, match=r"give solver=ReversiblePicard\(\) instead of Anderson"):
            fixed_point(lambda z, x: 0.5 * z + x, torch.zeros(2, 3), x, solver=Anderson(), adjoint=Reversible())

    def test_second_derivatives(self) -> None:
        x = torch.ones(2, 3, requires_grad=True)
        z = fixed_point(lambda z, x: torch.sin(z) * 0.5 + x, torch.zeros(2, 3), x, solver=PICARD, adjoint=Reversible()).z
        with pytest.raises(NotImplementedError, match=r"first derivatives only; use Implicit\(\)"):
            torch.autograd.grad(z.sum(), x, create_graph=True)

    def test_transforms(self) -> None:
        def loss(x: Tensor) -> Tensor:
            return fixed_point(lambda z, x: 0.5 * z + x, torch.zeros(2, 3), x, solver=PICARD, adjoint=Reversible()).z.sum()

        with pytest.raises(NotImplementedError, match=r"torch.func transforms; use Implicit\(\)"):
            torch.func.grad(loss)(torch.ones(2, 3))

    @pytest.mark.parametrize("damping", [0.0, 1.0, -1.0, 2.0])
    def test_a_step_that_cannot_be_undone(self, damping: float) -> None:
        with pytest.raises(ValueError, match=r"damping must lie strictly between 0 and 1"):
            ReversiblePicard(damping=damping)

    def test_a_tolerance_that_is_none(self) -> None:
        with pytest.raises(ValueError, match="tolerance must be > 0"):
            Reversible(tolerance=0.0)


def test_in_a_deq_with_parameters() -> None:
    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4).double()

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return torch.tanh(0.5 * self.inner(z) + x)

    torch.manual_seed(0)
    cell, x = Cell(), normal(0, 3, 4)
    found = []
    for adjoint in (Reversible(), Unrolled()):
        DEQ(cell, solver=PICARD, adjoint=adjoint)(x).z.square().sum().backward()
        found.append([p.grad for p in cell.parameters()])
        cell.zero_grad()
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)
