"""SHINE: what the forward solver learnt is used, measured, and given up where it is worth nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from problems import affine_map, diagonal_map, normal, normal_matrix, orthogonal, tanh_map
from steps import Unlimited
from torch import Tensor

from equilibria import Anderson, Broyden, Implicit, Neumann, Picard, Shine, Stopping, fixed_point
from equilibria.solvers.solver import Map, State, difference

TIGHT = Stopping(rtol=1e-13, atol=1e-15, max_evals=200)
X = normal(0, 4, 3)
A = normal_matrix(torch.tensor([0.9, -0.5, 0.2]))


def gradient(f: Any, args: tuple[Tensor, ...], of: Tensor, g: Tensor, **options: Any) -> tuple[Tensor, Any]:
    z, stats = fixed_point(f, torch.zeros_like(g), *args, **{"stopping": TIGHT, **options})
    return torch.autograd.grad(z, of, g)[0], stats


def test_exact_where_anderson_has_explored_the_whole_space() -> None:
    """On an affine map the differences of a d-dimensional solve determine I - A; the guess needs no refinement."""
    solver = Anderson(history=6)
    b = X.clone().requires_grad_()
    g = normal(1, 4, 3)
    found, stats = gradient(affine_map, (A, b), b, g, solver=solver, adjoint=Shine(refine=0))
    assert torch.allclose(found, torch.linalg.solve((torch.eye(3).double() - A).mT, g.mT).mT, rtol=1e-10)
    assert stats.backward[0].evaluations == 1
    assert float(stats.backward[0].relative.max()) < 1e-10


@pytest.mark.parametrize("solver", [Anderson(history=4), Broyden(), Broyden(history=2)], ids=repr)
@pytest.mark.parametrize("steps", [1, 3, 9])
def test_the_guess_is_the_transpose_of_the_step(solver: Any, steps: int) -> None:
    """With gᵀ H v = ⟨pull(g), v⟩, the step that the solver takes next is z + H (f(z) - z)."""
    W, x, v = 0.9 * orthogonal(6), normal(0, 5, 6), normal(1, 5, 6)
    f = Unlimited(lambda z: tanh_map(z, W, x))
    state = solver.init(f, torch.zeros_like(x))
    for _ in range(steps):
        state = solver.step(f, state)
    products = (state.pull(v) * state.g).sum(1)
    following = solver.step(f, state)  # writes over the oldest pair of `state`
    assert torch.allclose(products, (v * (following.z - state.z)).sum(1), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("solver", [Anderson(), Broyden(), Broyden(history=2)], ids=repr)
def test_refined_it_is_the_implicit_gradient(solver: Any) -> None:
    W, x, g = (0.8 * orthogonal(6)).requires_grad_(), normal(0, 5, 6), normal(1, 5, 6)
    found, stats = gradient(tanh_map, (W, x), W, g, solver=solver, adjoint=Shine(refine=40, rtol=1e-12))
    exact, _ = gradient(tanh_map, (W, x), W, g, solver=solver, adjoint=Implicit(stopping=TIGHT))
    assert stats.backward[0].converged.all()
    assert torch.allclose(found, exact, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("refine", [0, 1, 3])
def test_spends_one_product_on_the_guess_and_no_more_than_asked_on_refining(refine: int) -> None:
    W, x, g = (0.8 * orthogonal(30)).requires_grad_(), normal(0, 5, 30), normal(1, 5, 30)
    _, stats = gradient(tanh_map, (W, x), W, g, solver=Broyden(), adjoint=Shine(refine=refine, rtol=1e-12))
    assert stats.backward[0].evaluations == 1 + refine
    errors = stats.backward[0].residual
    if refine:
        _, fewer = gradient(tanh_map, (W, x), W, g, solver=Broyden(), adjoint=Shine(refine=refine - 1, rtol=1e-12))
        assert (errors < fewer.backward[0].residual).all()


@dataclass(frozen=True, kw_only=True)
class LiarState(State):
    lie: Tensor  # (B, 1)

    def pull(self, g: Tensor) -> Tensor:
        return self.lie * g


@dataclass(frozen=True)
class Liar:
    """Picard, with an estimate of the inverse that is wrong by a factor of its own for each sample."""

    lies: tuple[float, ...]

    def init(self, f: Map, z0: Tensor) -> LiarState:
        fz = f(z0)
        return LiarState(z=z0, fz=fz, g=difference(fz, z0), lie=torch.tensor(self.lies, dtype=z0.dtype).unsqueeze(1))

    def step(self, f: Map, state: LiarState) -> LiarState:
        fz = f(state.fz)
        return LiarState(z=state.fz, fz=fz, g=difference(fz, state.fz), lie=state.lie)


def test_falls_back_where_the_guess_is_worse_than_nothing() -> None:
    """(I - J)⁻¹ = 2: a guess of 2 g is exact; 100 g and NaN are not used; 1.9 g is better than g and is."""
    b = torch.ones(4, 2).double().requires_grad_()
    rates, g = torch.full((4, 2), 0.5).double(), normal(1, 4, 2)
    solver = Liar((2.0, 100.0, float("nan"), 1.9))
    found, stats = gradient(diagonal_map, (rates, b), b, g, solver=solver, adjoint=Shine(refine=0))
    expected = g * torch.tensor([2.0, 1.0, 1.0, 1.9], dtype=torch.float64).unsqueeze(1)
    assert torch.allclose(found, expected, rtol=1e-12)
    assert stats.backward[0].evaluations == 2
    plain, _ = gradient(diagonal_map, (rates, b), b, g, solver=Picard(), adjoint=Neumann(terms=1))
    assert torch.equal(found[1:3], plain[1:3])


@pytest.mark.parametrize("solver", [Anderson(), Broyden()], ids=["anderson", "broyden"])
def test_a_sample_solved_at_z0_has_learnt_nothing(solver: Any) -> None:
    """Whatever steps its neighbours take it along on: its guess is g, as it is alone."""
    W, z0 = 0.8 * orthogonal(20), normal(1, 3, 20)
    x = normal(0, 3, 20)
    x[0] = torch.atanh(0.5 * torch.tanh(z0[0])) - W @ (0.5 * torch.tanh(z0[0]))
    z0[0] = 0.5 * torch.tanh(z0[0])  # solved
    g, x = normal(2, 3, 20), x.requires_grad_()
    options: Any = {"solver": solver, "adjoint": Shine(refine=0), "stopping": Stopping(rtol=1e-8, max_evals=60)}
    z, stats = fixed_point(tanh_map, z0, W, x, **options)
    assert stats.steps.tolist()[0] == 0 < min(stats.steps.tolist()[1:])
    (together,) = torch.autograd.grad(z, x, g)
    part = x[:1].detach().requires_grad_()
    (alone,) = torch.autograd.grad(fixed_point(tanh_map, z0[:1], W, part, **options).z, part, g[:1])
    assert torch.allclose(together[:1], alone, rtol=1e-12)


@pytest.mark.parametrize("solver", [Anderson(), Broyden()], ids=["anderson", "broyden"])
def test_the_gradient_of_a_sample_does_not_depend_on_its_batch(solver: Any) -> None:
    """Its estimate is that of the step at which it was frozen, though neighbours go on and write over the history."""
    rates = torch.linspace(0.1, 0.3, 40).double().expand(3, 40).clone()
    rates[1] = torch.linspace(-0.99, 0.99, 40)
    b, g = normal(2, 3, 40).requires_grad_(), normal(1, 3, 40)
    options: Any = {"solver": solver, "adjoint": Shine(refine=0), "stopping": Stopping(rtol=1e-4, max_evals=60)}
    together, stats = gradient(diagonal_map, (rates, b), b, g, **options)
    assert int(stats.steps[1]) > int(stats.steps[0]) + 8
    for i in range(3):
        part = b[i : i + 1].detach().requires_grad_()
        alone, _ = gradient(diagonal_map, (rates[i : i + 1], part), part, g[i : i + 1], **options)
        assert torch.allclose(together[i : i + 1], alone, rtol=1e-6)


def test_derivatives_of_the_gradient() -> None:
    def layer(W: Tensor) -> Tensor:
        adjoint = Shine(refine=30, rtol=1e-13)
        return fixed_point(tanh_map, torch.zeros_like(X), W, X, stopping=TIGHT, adjoint=adjoint).z

    W = 0.8 * orthogonal(3)
    assert torch.autograd.gradgradcheck(layer, (W.clone().requires_grad_(),))
    jacobian = torch.func.jacrev(lambda W: fixed_point(tanh_map, torch.zeros_like(X), W, X, stopping=TIGHT).z)(W)
    assert torch.allclose(torch.func.jacrev(layer)(W), jacobian, rtol=1e-3)


def test_low_precision() -> None:
    W, x = (0.6 * orthogonal(4)).bfloat16().requires_grad_(), normal(0, 3, 4).bfloat16()
    z, stats = fixed_point(tanh_map, torch.zeros_like(x), W, x, stopping=Stopping(rtol=2e-2), adjoint=Shine(rtol=1e-2))
    (found,) = torch.autograd.grad(z.sum(), W)
    assert found.dtype == torch.bfloat16
    assert float(stats.backward[0].relative.max()) < 0.05


class TestRefuses:
    def test_a_solver_that_learns_nothing_about_the_jacobian(self) -> None:
        x = torch.ones(2, 3, requires_grad=True)
        options: Any = {"solver": Picard(), "adjoint": Shine()}
        with pytest.raises(ValueError, match=r"Broyden and Anderson make; give one of them as solver instead of Picard"):
            fixed_point(lambda z, x: 0.5 * z + x, torch.zeros(2, 3), x, **options)
        with torch.no_grad():  # where nothing is differentiated there is nothing to refuse
            assert fixed_point(lambda z, x: 0.5 * z + x, torch.zeros(2, 3), x, **options).stats.converged.all()

    @pytest.mark.parametrize(
        ("options", "error", "words"),
        [
            ({"refine": -1}, ValueError, r"Shine\(refine=-1\): refine must be an integer >= 0"),
            ({"rtol": -1.0}, ValueError, "rtol must be a finite number >= 0"),
            ({"solver": "gmres"}, TypeError, "solver='gmres' is no solver"),
        ],
    )
    def test_options(self, options: dict[str, Any], error: type[Exception], words: str) -> None:
        with pytest.raises(error, match=words):
            Shine(**options)
