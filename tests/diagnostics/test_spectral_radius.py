"""Spectral radii against eigenvalues that are known, or had from the whole Jacobian."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import PROBLEMS, affine_map, diagonal_map, jacobian, normal, normal_matrix, orthogonal, tanh_map
from torch import Tensor, nn

from equilibria.diagnostics import spectral_radius


def radius_of(A: Tensor, **options: Any) -> float:
    """Of z -> A z, which must converge."""
    radius, converged, _ = spectral_radius(affine_map, normal(0, 1, len(A)).to(A.dtype), A, 0 * A[:1], **options)
    assert converged.all()
    return float(radius)


@pytest.mark.parametrize(
    ("real", "rotations", "expected"),
    [
        ([0.9, 0.5, -0.3, 0.1], (), 0.9),
        ([-1.3, 0.5, 0.3, 0.1], (), 1.3),
        ([0.9, -0.9, 0.2, 0.1], (), 0.9),  # power iteration alternates for ever
        ([0.3, -0.2], ((0.95, 1.1),), 0.95),  # and here turns for ever
        ([0.3, -0.2], ((1.4, 3.1), (1.39, 0.02)), 1.4),
        ([0.8], ((0.8, 2.0), (0.8, 1.0)), 0.8),  # all of one modulus
        ([1.0], (), 1.0),
    ],
    ids=["positive", "negative", "opposite", "rotation", "expanding rotations", "one modulus", "one entry"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normal(real: list[float], rotations: Any, expected: float, dtype: torch.dtype) -> None:
    A = normal_matrix(torch.tensor(real), rotations).to(dtype)
    assert radius_of(A) == pytest.approx(expected, rel=1e-3)


def test_many_dimensions_need_restarts() -> None:
    """A complex pair of modulus 0.95, the rest of 300 eigenvalues within 0.9."""
    A = normal_matrix(torch.linspace(-0.9, 0.9, 298), ((0.95, 2.0),))
    assert radius_of(A, space=10, rtol=1e-4) == pytest.approx(0.95, rel=1e-4)


def test_not_normal() -> None:
    """With eigenvectors far from orthogonal, against the eigenvalues."""
    basis = torch.triu(normal(0, 6, 6), 1) + torch.eye(6).double()
    A = basis @ torch.diag(torch.tensor([-0.7, 0.5, 0.3, 0.2, 0.1, 0.0], dtype=torch.float64)) @ torch.linalg.inv(basis)
    assert radius_of(A) == pytest.approx(0.7, rel=1e-8)


def test_defective() -> None:
    """A Jordan block of size 3: accurate to the cube root of the rounding error."""
    block = 0.5 * torch.eye(3).double() + torch.diag(torch.ones(2).double(), 1)
    Q = orthogonal(3)
    assert radius_of(Q @ block @ Q.T) == pytest.approx(0.5, abs=1e-4)


class TestNilpotent:
    @pytest.mark.parametrize("size", [1, 2, 6, 15])
    @pytest.mark.parametrize("turned", [False, True])
    def test_powers_vanish(self, size: int, turned: bool) -> None:
        """Eigenvalues had from a matrix would be the size-th roots of the rounding error: 0.09 for 15."""
        A = torch.diag(torch.ones(size - 1).double(), 1)
        Q = orthogonal(size) if turned else torch.eye(size).double()
        assert radius_of(Q @ A @ Q.T) == 0.0

    def test_small_is_not_zero(self) -> None:
        assert radius_of(torch.diag(torch.tensor([1e-9, 1e-10]).double())) == pytest.approx(1e-9, rel=1e-3)
        block = torch.block_diag(torch.tensor([[0.05]]), torch.tensor([[0.0, 100.0], [0.0, 0.0]])).double()
        assert radius_of(block) == pytest.approx(0.05, rel=1e-3)

    def test_of_a_map_that_ignores_z(self) -> None:
        radius, converged, _ = spectral_radius(lambda z, x: x, torch.zeros(2, 3), torch.ones(2, 3))
        assert converged.all()
        assert torch.equal(radius, torch.zeros(2))


def test_each_sample_by_itself() -> None:
    rates = torch.tensor([[0.1, -0.2, 0.3], [2.0, 0.1, -0.1], [0.0, 0.0, 0.0], [0.5, -0.5, 0.5]]).double()
    radius, converged, _ = spectral_radius(diagonal_map, torch.zeros(4, 3).double(), rates, 0 * rates)
    assert converged.all()
    assert torch.allclose(radius, torch.tensor([0.3, 2.0, 0.0, 0.5]).double(), rtol=1e-10)


def test_a_sample_does_not_depend_on_harder_ones() -> None:
    """An easy sample keeps what it converged to, whether or not others go on."""
    easy = torch.linspace(-0.5, 0.5, 40).double()
    easy[7] = 0.9
    hard = torch.linspace(0.9, 1.0, 40).double()
    z = torch.zeros(2, 40).double()
    both = spectral_radius(diagonal_map, z, torch.stack((hard, easy)), z, space=5, rtol=1e-5)
    first = spectral_radius(diagonal_map, z[:1], easy.unsqueeze(0), z[:1], space=5, rtol=1e-5)
    assert both.products[1] == first.products[0] < both.products[0]
    assert torch.allclose(both.radius[1], first.radius[0], rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("name", sorted(PROBLEMS))
def test_agrees_with_the_dense_jacobian(name: str) -> None:
    """At the fixed points of all test problems, nested states included."""
    problem = PROBLEMS[name](3, (2, 3), torch.float64)
    expected = torch.linalg.eigvals(jacobian(problem.f, problem.exact, *problem.args)).abs().amax(dim=1)
    radius, converged, _ = spectral_radius(problem.f, problem.exact, *problem.args)
    assert converged.all()
    assert torch.allclose(radius, expected, rtol=1e-3)


def test_of_a_module_without_touching_its_gradients() -> None:
    layer = nn.Linear(4, 4).double()
    z = normal(0, 2, 4)
    expected = torch.linalg.eigvals(layer.weight.detach()).abs().max()
    for grad in (torch.enable_grad, torch.no_grad):
        with grad():
            radius = spectral_radius(layer, z).radius
        assert not radius.requires_grad
        assert torch.allclose(radius, expected.expand(2), rtol=1e-6)
    assert layer.weight.grad is None


def test_out_of_budget_says_so() -> None:
    A = normal_matrix(torch.linspace(0.99, 1.0, 100))
    radius, converged, products = spectral_radius(
        affine_map, torch.zeros(1, 100).double(), A, 0 * A[:1], rtol=1e-6, max_products=7
    )
    assert not converged.any()
    assert products.tolist() == [7]
    assert 0.9 < float(radius) <= 1.0


def test_a_jacobian_that_is_not_finite_gives_nan_for_that_sample_alone() -> None:
    z = torch.tensor([[0.0, 0.0], [1.0, 1.0]]).double()
    radius, converged, _ = spectral_radius(lambda z: z.sqrt(), z)  # √z has slope 1/2 at 1
    assert radius[0].isnan()
    assert converged.tolist() == [False, True]
    assert float(radius[1]) == pytest.approx(0.5)


def test_bfloat16_is_summed_in_float32() -> None:
    A = normal_matrix(torch.tensor([0.9, 0.5, -0.2])).bfloat16()
    radius = spectral_radius(affine_map, torch.zeros(2, 3).bfloat16(), A, torch.zeros(2, 3).bfloat16()).radius
    assert radius.dtype == torch.float32
    assert radius.tolist() == pytest.approx([0.9, 0.9], rel=2e-2)


def test_leaves_the_random_state_alone_and_repeats_itself() -> None:
    W, z, x = normal(0, 50, 50) / 7, normal(1, 2, 50), normal(2, 2, 50)
    before = torch.get_rng_state()
    first = spectral_radius(tanh_map, z, W, x)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.radius, spectral_radius(tanh_map, z, W, x).radius)
    other = spectral_radius(tanh_map, z, W, x, generator=torch.Generator().manual_seed(5)).radius
    assert torch.allclose(first.radius, other, rtol=5e-3)


@pytest.mark.parametrize("options", [{"max_products": 0}, {"space": 1}, {"rtol": 0.0}, {"rtol": 1.0}])
def test_refuses_what_makes_no_sense(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"must (be an integer >=|lie between)"):
        spectral_radius(torch.sin, torch.zeros(1, 2), **options)
