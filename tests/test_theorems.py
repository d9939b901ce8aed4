"""What is proven of the methods, checked on the code: rates, finite termination, equivalences, invariances.

Theorems of one method alone stand with its tests in tests/solvers; here are those that join several, or hold for all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from problems import affine_map, jacobian, matmul, normal, normal_matrix, orthogonal, tanh_map
from steps import Unlimited, iterates
from torch import Tensor

from equilibria import GMRES, Anderson, Broyden, Implicit, NewtonKrylov, Picard, Status, Stopping, Unrolled, fixed_point
from equilibria.stopping import l2

SOLVERS: dict[str, Any] = {
    "picard": Picard(),
    "picard damped": Picard(damping=0.4),
    "anderson": Anderson(history=3),
    "anderson damped": Anderson(history=3, damping=0.6),
    "broyden": Broyden(history=3),
    "anderson, first type": Anderson(history=3, type=1),
    "broyden put back": Broyden(history=3, divergence=2.0),
    "line search": Broyden(line_search=4),
    "newton": NewtonKrylov(),
    "gmres": GMRES(restart=3),
}
each_solver = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)


def residuals(A: Tensor, b: Tensor, solver: Any, steps: int) -> Tensor:
    """(1 + steps, B) ‖f(z) - z‖₂ from z = 0, whether converged or not."""
    stopping = Stopping(rtol=0, atol=0, max_evals=steps + 2, norm=l2, trace=True)  # GMRES keeps one to measure at the end
    trace = fixed_point(affine_map, torch.zeros_like(b), A, b, solver=solver, stopping=stopping).stats.trace
    assert trace is not None
    return trace[: steps + 1]


class TestRates:
    @pytest.mark.parametrize("damping", [1.0, 0.5])
    @pytest.mark.parametrize("name", ["nonlinear", "defective"])
    def test_picards_is_the_spectral_radius_at_the_fixed_point(self, name: str, damping: float) -> None:
        """Of J at z*, also where f is not affine; where J is a Jordan block it is reached slowly, as (k + 1) / k."""
        if name == "nonlinear":
            args: tuple[Tensor, ...] = (normal_matrix(torch.linspace(0.1, 0.95, 5)), 0.3 * normal(0, 1, 5))
            f: Callable[..., Tensor] = tanh_map
            first, last, slack = 60, 90, 1e-4
        else:
            args = (0.9 * torch.eye(3).double() + 0.05 * torch.diag(torch.ones(2), 1), torch.zeros(1, 3).double())
            f, first, last, slack = affine_map, 1200, 1250, 2e-3
        z0 = torch.ones_like(args[1])
        stopping = Stopping(rtol=0, atol=1e-300, max_evals=last + 1, trace=True)
        trace = fixed_point(f, z0, *args, solver=Picard(damping=damping), stopping=stopping).stats.trace
        exact = fixed_point(f, z0, *args, solver=Anderson(), stopping=Stopping(rtol=1e-14, atol=0, max_evals=200)).z
        assert trace is not None
        J = jacobian(f, exact, *args)[0]
        radius = float(torch.linalg.eigvals((1 - damping) * torch.eye(len(J)) + damping * J).abs().max())
        observed = float((trace[last, 0] / trace[first, 0]) ** (1 / (last - first)))
        assert observed == pytest.approx(radius, rel=slack)

    @pytest.mark.parametrize("solver", [Picard(), Picard(damping=0.5)], ids=["plain", "damped"])
    def test_banach(self, solver: Picard) -> None:
        """A map with Lipschitz constant L: the residual falls by L at every step, and ‖z - z*‖ <= ‖f(z) - z‖ / (1 - L)."""
        L = 0.9
        W, x = L * orthogonal(6), normal(1, 4, 6)
        per_step = (1 - solver.damping) + solver.damping * L
        exact = fixed_point(tanh_map, 0 * x, W, x, stopping=Stopping(rtol=1e-14, atol=0, max_evals=300)).z
        for budget in (2, 5, 9):
            stopping = Stopping(rtol=0, max_evals=budget, norm=l2, trace=True)
            z, stats = fixed_point(tanh_map, 0 * x, W, x, solver=solver, stopping=stopping)
            assert stats.trace is not None
            assert all((after <= per_step * before).all() for before, after in pairwise(stats.trace))
            assert (l2(z - exact) <= stats.residual / (1 - L)).all()

    @pytest.mark.parametrize("history", [1, 2, 5])
    def test_anderson_is_no_slower_than_the_contraction(self, history: int) -> None:
        """‖A‖₂ = c < 1 gives ‖r_k‖ <= c^k ‖r_0‖ for any history (Toth and Kelley 2015, theorem 2.1)."""
        c = 0.95
        A = c * orthogonal(12) @ torch.diag(torch.linspace(0.2, 1.0, 12).double()) @ orthogonal(12, seed=1)
        trace = residuals(A, normal(0, 3, 12), Anderson(history=history), 40)
        powers = c ** torch.arange(41, dtype=torch.float64).unsqueeze(1)
        assert (trace <= powers * trace[0] * (1 + 1e-12)).all()

    @pytest.mark.parametrize("solver", [Anderson(history=1, ridge=0.0), Broyden(history=1)], ids=["anderson", "broyden"])
    def test_in_one_dimension_it_is_the_secant_method(self, solver: Any) -> None:
        """Step by step; so it converges with order 1.618."""
        f = torch.cos
        found = iterates(solver, f, torch.tensor([[0.3], [2.0]]).double(), 6)
        for older, old, new in zip(found, found[1:], found[2:], strict=False):
            g, g_older = f(old) - old, f(older) - older
            moving = g.abs() > 1e-9
            secant = old - g * (old - older) / (g - g_older)
            assert torch.allclose(new[moving], secant[moving], rtol=1e-12)
        errors = [float((z[0] - 0.7390851332151607).abs()) for z in found]
        assert errors[3] > 1e-9  # still above rounding, and far below the first
        assert math.log(errors[4]) / math.log(errors[3]) > 1.5


class TestDerivativesOfIterates:
    @pytest.mark.parametrize(
        ("solver", "size"),
        [
            pytest.param(Picard(), 8, id="picard"),
            pytest.param(Picard(damping=0.4), 8, id="picard damped"),
            pytest.param(Anderson(history=3), 8, id="anderson"),
            pytest.param(Anderson(history=3, damping=0.6), 8, id="anderson damped"),
            pytest.param(Broyden(history=3), 8, id="broyden"),
            pytest.param(Broyden(line_search=3), 4, id="line search"),
            pytest.param(NewtonKrylov(), 8, id="newton"),
            pytest.param(NewtonKrylov(forcing=1e-6), 4, id="newton in all of its space"),
            pytest.param(GMRES(), 4, id="gmres"),
        ],
    )
    def test_tend_to_the_derivative_of_the_fixed_point(self, solver: Any, size: int) -> None:
        """As the iterates do, to the last digits (Gilbert 1992, "Automatic differentiation and iterative processes")."""
        W, x = 0.7 * orthogonal(size), normal(0, 3, size)
        f = affine_map if isinstance(solver, GMRES) else tanh_map

        def gradient(rtol: float, solver: Any, adjoint: Any) -> Tensor:
            weight = W.clone().requires_grad_()
            stopping = Stopping(rtol=rtol, atol=0, max_evals=400)
            z = fixed_point(f, 0 * x, weight, x, solver=solver, stopping=stopping, adjoint=adjoint).z
            return torch.autograd.grad(z.square().sum(), weight)[0]

        exact = gradient(1e-13, Picard(), Implicit(stopping=Stopping(rtol=1e-13, atol=0, max_evals=200)))
        for rtol in (1e-3, 1e-6, 1e-9, 1e-12, 1e-14):
            error = (gradient(rtol, solver, Unrolled()) - exact).norm() / exact.norm()
            # Rounding, times the condition of the small systems of Anderson and Broyden, which is squared in a derivative.
            assert error <= 100 * rtol + 1e-8, f"rtol {rtol}"


class TestFiniteTermination:
    """On a linear map of any dimension whose minimal polynomial has degree p, a method that needs the Krylov space alone
    is done when that space is: GMRES in p steps, full Anderson in p + 2 evaluations, Broyden in 2p steps (O'Leary 1995)."""

    @pytest.mark.parametrize("eigenvalues", [(0.5,), (-2.0, 0.5), (0.9, -0.9, 3.0), (0.2, -1.5, 0.99, 5.0)])
    @pytest.mark.parametrize("solver", [GMRES(), Anderson(history=8), Broyden()], ids=["gmres", "anderson", "broyden"])
    def test_in_as_many_steps_as_there_are_eigenvalues(self, solver: Any, eigenvalues: tuple[float, ...]) -> None:
        p, d = len(eigenvalues), 60
        A = normal_matrix(torch.tensor(eigenvalues).repeat(d // p + 1)[:d])
        b = normal(0, 3, d)
        z, stats = fixed_point(affine_map, 0 * b, A, b, solver=solver, stopping=Stopping(rtol=1e-7, max_evals=40))
        exact = torch.linalg.solve(torch.eye(d).double() - A, b.mT).mT
        assert stats.converged.all()
        assert stats.steps.max() <= {GMRES: p, Anderson: p + 1, Broyden: 2 * p}[type(solver)]
        assert torch.allclose(z, exact, rtol=1e-4, atol=1e-4)

    def test_a_nilpotent_map_is_solved_by_applying_it(self) -> None:
        """J^d = 0 in spite of its size: Picard is done after d steps, whatever happens on the way."""
        d = 6
        A = torch.diag(torch.full((d - 1,), 10.0), 1).double()
        z, stats = fixed_point(affine_map, torch.zeros(1, d).double(), A, torch.ones(1, d).double(), solver=Picard(),
                               stopping=Stopping(rtol=0, atol=0, norm=l2, trace=True))  # fmt: skip
        assert stats.steps.tolist() == [d]
        assert stats.trace is not None
        assert stats.trace.max() > 1e4 * stats.trace[0].max()
        assert z[0].tolist() == [float("1" * (d - i)) for i in range(d)]


class TestGMRES:
    @pytest.mark.parametrize("restart", [2, 5, 30])
    @pytest.mark.parametrize("size", [0.9, 3.0])
    def test_its_residual_never_grows(self, restart: int, size: float) -> None:
        A, b = size * normal(1, 20, 20) / 20**0.5, normal(0, 3, 20)
        trace = residuals(A, b, GMRES(restart=restart), 40)
        assert all((after <= before * (1 + 1e-9) + 1e-9).all() for before, after in pairwise(trace))

    @pytest.mark.parametrize("d", [3, 8])
    def test_may_stand_still_until_the_last_step(self, d: int) -> None:
        """b - P z with a cyclic shift P: no step but the d-th lowers the residual (Greenbaum, Pták and Strakoš 1996)."""
        P = torch.eye(d).double().roll(1, dims=0)
        b = torch.eye(d).double()[:1]
        A = torch.eye(d).double() - P
        trace = residuals(A, b, GMRES(restart=d), d)
        assert torch.allclose(trace[:d], torch.ones(d, 1).double(), rtol=1e-14)
        assert trace[d] < 1e-14
        z, stats = fixed_point(affine_map, 0 * b, A, b, solver=GMRES(restart=d), stopping=Stopping(rtol=1e-12))
        assert stats.converged.all()
        assert stats.steps.tolist() == [d]
        assert torch.allclose(z @ P.T, b, atol=1e-12)

    @pytest.mark.parametrize("damping", [1.0, 0.6])
    @pytest.mark.parametrize("size", [0.8, 2.0])
    def test_full_anderson_is_gmres_one_evaluation_later(self, damping: float, size: float) -> None:
        """z_{k+1} of Anderson = z_k + damping (f(z_k) - z_k) at z_k of GMRES (Walker and Ni 2011, theorem 2.2)."""
        A, b = size * normal(3, 12, 12) / 12**0.5, normal(1, 2, 12)
        f = lambda z: affine_map(z, A, b)  # noqa: E731
        steps = 7
        gmres = iterates(GMRES(restart=20), f, 0 * b, steps)
        anderson = iterates(Anderson(history=20, damping=damping, ridge=0.0), f, 0 * b, steps + 1)
        for k in range(steps + 1):
            expected = gmres[k] + damping * (f(gmres[k]) - gmres[k])
            assert torch.allclose(anderson[k + 1], expected, rtol=1e-7, atol=1e-7), f"step {k}"


class TestInvariance:
    """The same problem in other coordinates w = M z + c, where it is w ← M f(M⁻¹ (w - c)) + c, has the same iterates."""

    affine = (0.9 * normal(5, 6, 6) / 6**0.5, normal(6, 2, 6))

    def f(self, solver: Any) -> Callable[[Tensor], Tensor]:
        A, b = self.affine
        return (lambda z: affine_map(z, A, b)) if isinstance(solver, GMRES) else (lambda z: tanh_map(z, A, b))

    @each_solver
    def test_rotated_and_shifted(self, solver: Any) -> None:
        f, Q, c, z0 = self.f(solver), orthogonal(6, seed=9), normal(7, 6), normal(8, 2, 6)
        here = iterates(solver, f, z0, 9)
        there = iterates(solver, lambda w: matmul(Q, f(matmul(Q.T, w - c))) + c, matmul(Q, z0) + c, 9)
        for step, (z, w) in enumerate(zip(here, there, strict=True)):
            assert torch.allclose(matmul(Q, z) + c, w, rtol=1e-8, atol=1e-8), f"step {step}"

    @each_solver
    @pytest.mark.parametrize("scale", [2.0**-40, 2.0**-3, 2.0**40])
    def test_scaled_by_a_power_of_two_bit_for_bit(self, solver: Any, scale: float) -> None:
        """Such a product is exact, so any difference comes of an absolute number hidden in the method."""
        f, z0 = self.f(solver), normal(8, 2, 6)
        here, there = Unlimited(f), Unlimited(lambda w: scale * f(w / scale))
        state, scaled = solver.init(here, z0), solver.init(there, scale * z0)
        for step in range(12):
            assert torch.equal(scale * state.z, scaled.z), f"step {step}"
            assert torch.equal(scale * state.g, scaled.g), f"step {step}"
            state, scaled = solver.step(here, state), solver.step(there, scaled)

    @pytest.mark.parametrize("solver", [Picard(), Picard(damping=0.4)], ids=["plain", "damped"])
    def test_picard_in_any_coordinates(self, solver: Any) -> None:
        f, M, z0 = self.f(solver), normal(10, 6, 6), normal(8, 2, 6)
        here = iterates(solver, f, z0, 9)
        there = iterates(solver, lambda w: matmul(M, f(matmul(torch.linalg.inv(M), w))), matmul(M, z0), 9)
        for z, w in zip(here, there, strict=True):
            assert torch.allclose(matmul(M, z), w, rtol=1e-9, atol=1e-9)

    @each_solver
    def test_copies_of_a_sample_are_solved_alike(self, solver: Any) -> None:
        A, b = self.affine
        f = affine_map if isinstance(solver, GMRES) else tanh_map
        stopping = Stopping(rtol=1e-8, max_evals=300)
        z, stats = fixed_point(f, normal(8, 2, 6).repeat(3, 1), A, b.repeat(3, 1), solver=solver, stopping=stopping)
        assert stats.status.tolist() == [Status.CONVERGED] * 6
        assert torch.allclose(z[:2], z[2:4], rtol=1e-12)
        assert torch.equal(stats.steps[:2], stats.steps[2:4])
