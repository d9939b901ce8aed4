"""Problems that are hard, with known answers: who must solve them does, and nobody claims what he has not.

The error of an affine problem is bounded through its condition: ‖z - z*‖ <= ‖(I - A)⁻¹‖ (‖f(z) - z‖ + rounding).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import pi
from typing import Any

import pytest
import torch
from problems import PROBLEMS, Counted, affine_map, flat, normal, normal_matrix, orthogonal, tanh_map
from torch import Tensor

from equilibria import GMRES, Anderson, Broyden, NewtonKrylov, Picard, Status, Stopping, fixed_point
from equilibria.stopping import Norm, l2, linf, rms

SOLVERS: dict[str, Any] = {
    "picard": Picard(),
    "picard damped": Picard(damping=0.5),
    "anderson": Anderson(),
    "anderson long": Anderson(history=20),
    "anderson damped": Anderson(damping=0.5),
    "broyden": Broyden(),
    "broyden long": Broyden(history=30),
    "line search": Broyden(line_search=5),
    "newton": NewtonKrylov(),
    "gmres": GMRES(),
}
ROOT_SOLVERS = {name: solver for name, solver in SOLVERS.items() if name != "gmres"}
each_solver = pytest.mark.parametrize("solver", SOLVERS)
each_root_solver = pytest.mark.parametrize("solver", ROOT_SOLVERS.values(), ids=ROOT_SOLVERS)
ALL_BUT_PICARD = set(SOLVERS) - {"picard", "picard damped"}
LONG = {"anderson long", "newton", "gmres"}


@dataclass(frozen=True)
class Hard:
    """z = A z + b, and the solvers that must solve it; the others may run out of budget."""

    A: Tensor
    must: set[str]

    def __post_init__(self) -> None:
        assert self.must <= set(SOLVERS)


def with_singular_values(values: Tensor, *, symmetric: bool) -> Tensor:
    """A with these singular values of I - A; symmetric: they are also its eigenvalues."""
    size = len(values)
    left = orthogonal(size, seed=1)
    right = left if symmetric else orthogonal(size, seed=2)
    return torch.eye(size).double() - left @ torch.diag(values.double()) @ right.T


def jordan(eigenvalue: float, above: float, size: int) -> Tensor:
    return eigenvalue * torch.eye(size).double() + torch.diag(torch.full((size - 1,), above).double(), 1)


NOTHING = torch.tensor([])
ANGLES = (0.6, 1.0, 1.5, 2.0, 2.5, 3.0)
SPREAD = torch.linspace(0.5, 1.5, 7)
HARD = {
    "condition 1e6": Hard(with_singular_values(torch.logspace(0, -6, 8), symmetric=False), LONG),
    "condition 1e8": Hard(with_singular_values(torch.logspace(0, -8, 8), symmetric=False), LONG),
    "condition 1e8, symmetric": Hard(with_singular_values(torch.logspace(0, -8, 8), symmetric=True), LONG),
    "one direction of 1e-6": Hard(
        with_singular_values(torch.cat((SPREAD, torch.tensor([1e-6]))), symmetric=True), ALL_BUT_PICARD
    ),
    "one direction of 1e-8": Hard(
        with_singular_values(torch.cat((SPREAD, torch.tensor([1e-8]))), symmetric=True), ALL_BUT_PICARD
    ),
    "quarter turns of 0.99": Hard(normal_matrix(NOTHING, ((0.99, pi / 2),) * 4), set(SOLVERS) - {"picard"}),
    "quarter turns of 1": Hard(normal_matrix(NOTHING, ((1.0, pi / 2),) * 4), set(SOLVERS) - {"picard"}),
    "quarter turns of 1.5": Hard(normal_matrix(NOTHING, ((1.5, pi / 2),) * 4), set(SOLVERS) - {"picard"}),
    "six turns of 1": Hard(normal_matrix(NOTHING, tuple((1.0, angle) for angle in ANGLES)), set(SOLVERS) - {"picard"}),
    "six turns of 1.5": Hard(normal_matrix(NOTHING, tuple((1.5, angle) for angle in ANGLES)), LONG | {"broyden long"}),
    "radius 0.999": Hard(normal_matrix(torch.linspace(-0.999, 0.999, 20)), ALL_BUT_PICARD - {"line search"}),
    "Jordan block of 0.5": Hard(jordan(0.5, 2.0, 10), set(SOLVERS) - {"line search"}),
    "Jordan block of 0.9": Hard(jordan(0.9, 1.0, 6), set(SOLVERS) - {"line search"}),
}


@each_solver
@pytest.mark.parametrize("name", HARD)
def test_solves_it_or_says_that_it_did_not(solver: str, name: str) -> None:
    A, b = HARD[name].A, normal(3, 2, len(HARD[name].A))
    system = torch.eye(len(A)).double() - A
    exact = torch.linalg.solve(system, b.mT).mT
    stopping = Stopping(rtol=1e-10, atol=0, max_evals=700, norm=l2)
    z, stats = fixed_point(affine_map, 0 * b, A, b, solver=SOLVERS[solver], stopping=stopping, raise_nonfinite=False)
    fz = affine_map(z, A, b)
    residual, rounding = l2(fz - z), torch.finfo(torch.float64).eps * len(A) * (l2(z) * l2(A).norm() + l2(b))
    assert torch.allclose(stats.residual, residual, rtol=1e-9, atol=float(rounding.max()))
    assert (residual[stats.converged] <= 1e-10 * l2(fz)[stats.converged] + rounding[stats.converged]).all()
    assert (l2(z - exact) <= torch.linalg.matrix_norm(torch.linalg.inv(system), ord=2) * (residual + rounding)).all()
    if solver in HARD[name].must:
        assert stats.converged.all()
    else:
        assert (stats.status != Status.NONFINITE).all()
        assert stats.converged.all() or stats.evaluations == 700


class TestNonlinear:
    @each_root_solver
    @pytest.mark.parametrize("radius", [0.99, 1.0, 1.5])
    def test_a_rotation_where_picard_goes_round(self, solver: Any, radius: float) -> None:
        """tanh of a quarter turn in every plane; the fixed point is the one near 0 (see problems.tanh_expansion)."""
        W, x = normal_matrix(NOTHING, ((radius, pi / 2),) * 3), 0.1 * normal(4, 5, 6)
        stopping = Stopping(rtol=1e-9, atol=0, max_evals=100)
        z, stats = fixed_point(tanh_map, 0 * x, W, x, solver=solver, stopping=stopping)
        if isinstance(solver, Picard) and (solver.damping == 1.0 or radius == 1.5):
            assert stats.status.tolist() == [Status.EXHAUSTED] * 5
            return
        assert stats.converged.all()
        assert (l2(tanh_map(z, W, x) - z) <= 1e-9 * l2(z) * (1 + 1e-6)).all()
        assert z.abs().max() < 0.3

    @each_root_solver
    def test_a_double_root(self, solver: Any) -> None:
        """z - z²: where I - J is singular, a residual of r allows an error of √r, and no more."""
        stopping = Stopping(rtol=0, atol=1e-6, max_evals=2500)
        z, stats = fixed_point(lambda z: z - z * z, torch.full((1, 1), 0.5).double(), solver=solver, stopping=stopping)
        assert stats.converged.all()
        assert 0 < float(z.abs()) <= 1e-3 * (1 + 1e-9)

    @each_root_solver
    @pytest.mark.parametrize("problem", ["tanh_contraction", "cosine", "nested", "affine"])
    def test_to_the_last_digits_of_float64(self, solver: Any, problem: str) -> None:
        made = PROBLEMS[problem](3, (5,), torch.float64)
        stopping = Stopping(rtol=1e-14, atol=0, max_evals=500)
        z, stats = fixed_point(made.f, made.z0, *made.args, solver=solver, stopping=stopping)
        assert stats.converged.all()
        assert torch.allclose(flat(z), flat(made.exact), rtol=1e-12, atol=1e-13)

    @each_root_solver
    def test_parts_of_very_different_size(self, solver: Any) -> None:
        """One norm serves the whole state: the tolerance is that of the largest part, and must be small for the others."""
        scale = torch.logspace(-5, 5, 5).double()
        f = lambda z, x: scale * torch.tanh(0.5 * z / scale + x)  # noqa: E731
        x = normal(0, 2, 5)
        stopping = Stopping(rtol=1e-14, atol=0, max_evals=300)
        z, stats = fixed_point(f, 0 * x, x, solver=solver, stopping=stopping)
        exact = fixed_point(lambda z, x: torch.tanh(0.5 * z + x), 0 * x, x, solver=Picard(), stopping=stopping).z
        assert stats.converged.all()
        assert torch.allclose(z, scale * exact, rtol=1e-8, atol=1e-8)


class TestOneHardAmongThousand:
    B, PLACE = 1000, 617

    @staticmethod
    def f(z: Tensor, rates: Tensor, x: Tensor) -> Tensor:
        return rates * torch.sin(z) + x

    @pytest.mark.parametrize("solver", [Picard(), Anderson(), Broyden()], ids=["picard", "anderson", "broyden"])
    def test_the_easy_ones_do_not_pay(self, solver: Any) -> None:
        """With batch_dims known: not in rows of f evaluated, not in steps, and not in their answers."""
        rates = torch.full((self.B, 1), 0.1).double()
        rates[self.PLACE] = 0.999
        x = 0.001 + 0.1 * normal(0, self.B, 3)
        x[self.PLACE] = 0.001
        stopping = Stopping(rtol=1e-8, max_evals=2000)
        f = Counted(self.f)
        z, stats = fixed_point(f, 0 * x, rates, x, solver=solver, stopping=stopping, batch_dims=(0, 0))
        others = torch.arange(self.B) != self.PLACE
        easy = fixed_point(self.f, 0 * x[others], rates[others], x[others], solver=solver, stopping=stopping)
        assert stats.converged.all()
        assert torch.equal(stats.steps[others], easy.stats.steps)
        assert torch.allclose(z[others], easy.z, rtol=1e-12, atol=1e-12)
        hard, most = int(stats.steps[self.PLACE]), int(easy.stats.steps.max())
        assert hard > 2 * most
        assert f.rows <= self.B * (1 + most) + (hard - most)


class TestDivergence:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    @pytest.mark.parametrize("norm", [rms, l2, linf])
    @pytest.mark.parametrize("solver", [Picard(), Picard(damping=0.9)], ids=["plain", "damped"])
    @pytest.mark.parametrize("growth", [1.5, 2.0, 4.0, -3.0])
    def test_ends_in_nonfinite_and_never_in_converged(
        self, request: pytest.FixtureRequest, dtype: torch.dtype, norm: Norm, solver: Picard, growth: float
    ) -> None:
        """Squares overflow long before z does, those of ‖f(z)‖ before those of ‖f(z) - z‖."""
        f: Callable[[Tensor], Tensor] = lambda z: growth * z + 1  # noqa: E731
        stopping = Stopping(max_evals=10_000, norm=norm, check_every=100)
        z0 = torch.ones(1, 3, dtype=dtype)
        z, stats = fixed_point(f, z0, solver=solver, stopping=stopping, raise_nonfinite=False)
        assert stats.status.tolist() == [Status.NONFINITE]
        assert torch.equal(z, z0)  # the smallest residual was the first

    @each_root_solver
    def test_without_any_fixed_point(self, solver: Any) -> None:
        stopping = Stopping(rtol=0, atol=1e-6, max_evals=300)
        for f in (lambda z: z**2 + 1, torch.exp, lambda z: z + 1 + z.abs()):
            z, stats = fixed_point(f, torch.ones(2, 3), solver=solver, stopping=stopping, raise_nonfinite=False)
            assert not stats.converged.any()
            assert z.isfinite().all()
