"""Every solver on every problem it must solve, for both dtypes and all batch and trailing shapes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from problems import PROBLEMS, Counted, Problem, flat, residual_of
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from equilibria import (
    GMRES,
    Anderson,
    Broyden,
    Implicit,
    NewtonKrylov,
    Picard,
    Solution,
    Status,
    Stopping,
    Unrolled,
    fixed_point,
)
from equilibria.stopping import l2, linf, rms

SOLVERS: dict[str, Any] = {
    "picard": Picard(),
    "picard-damped": Picard(damping=0.4),
    "anderson": Anderson(),
    "anderson-damped": Anderson(history=8, damping=0.6),
    "anderson-by-progress": Anderson(damping=None),
    "broyden": Broyden(),
    "broyden-line-search": Broyden(history=8, line_search=5),
    "gmres": GMRES(restart=7),
    "newton-krylov": NewtonKrylov(),
    "jacobian-free": NewtonKrylov(differences=True),
    "newton-krylov-tight": NewtonKrylov(forcing=1e-3, max_krylov=8),
}
BATCHES = (1, 3, 17)
SHAPES: tuple[tuple[int, ...], ...] = ((), (5,), (2, 3))
RTOL = {torch.float32: 1e-5, torch.float64: 1e-10}
ATOL = {torch.float32: 1e-6, torch.float64: 1e-12}
DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


@pytest.fixture
def default_float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@dataclass(frozen=True)
class Case:
    solver: str
    problem: str
    dtype: torch.dtype
    batch: int
    shape: tuple[int, ...]
    device: str

    def __str__(self) -> str:
        return f"{self.solver}-{self.problem}-{str(self.dtype)[6:]}-{self.batch}-{self.shape}-{self.device}"


def must_solve(solver: str, problem: Problem) -> bool:
    return {"gmres": problem.affine, "picard": problem.picard}.get(solver, True)


CASES = [
    case
    for case in (Case(*values) for values in product(SOLVERS, PROBLEMS, RTOL, BATCHES, SHAPES, DEVICES))
    if must_solve(case.solver, PROBLEMS[case.problem](1, (), torch.float64))
]


@cache
def problem_of(problem: str, dtype: torch.dtype, batch: int, shape: tuple[int, ...], device: str) -> Problem:
    made = PROBLEMS[problem](batch, shape, dtype)
    if device == "cpu":
        return made
    values = {
        k: tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, v) for k, v in vars(made).items()
    }
    return Problem(**values)


@cache
def solve(case: Case) -> tuple[Problem, Stopping, Counted, Solution]:
    problem = problem_of(case.problem, case.dtype, case.batch, case.shape, case.device)
    stopping = Stopping(rtol=RTOL[case.dtype], atol=ATOL[case.dtype], max_evals=1000)
    f = Counted(problem.f)
    return problem, stopping, f, fixed_point(f, problem.z0, *problem.args, solver=SOLVERS[case.solver], stopping=stopping)


@pytest.mark.parametrize("case", CASES, ids=str)
class TestConformance:
    def test_finds_the_exact_fixed_point(self, case: Case) -> None:
        problem, stopping, _, (z, stats) = solve(case)
        assert stats.status.tolist() == [Status.CONVERGED] * case.batch
        residual, scale = l2(residual_of(problem.f, z, *problem.args)), l2(flat(problem.f(z, *problem.args)))
        size = flat(z).shape[1]
        assert (residual <= 1.001 * (stopping.atol * size**0.5 + stopping.rtol * scale)).all()
        # To first order error <= condition · residual; 1.5 leaves room for the second. f itself is rounded, and so is z*.
        error = l2(flat(z).double() - flat(problem.exact))
        rounding = torch.finfo(case.dtype).eps * size * scale
        assert (error <= 1.5 * problem.condition * (residual + rounding) + 1e-15).all()

    def test_reports_what_it_returns_and_what_it_cost(self, case: Case) -> None:
        problem, stopping, f, (z, stats) = solve(case)
        residual, scale = rms(residual_of(problem.f, z, *problem.args)), rms(flat(problem.f(z, *problem.args)))
        rounding = 8 * torch.finfo(case.dtype).eps
        assert torch.allclose(stats.residual, residual, rtol=rounding, atol=float(rounding * scale.max()))
        assert torch.allclose(stats.relative * scale, stats.residual, rtol=rounding, atol=float(rounding * scale.max()))
        assert stats.evaluations <= stopping.max_evals
        if case.solver.startswith("newton"):  # products with the Jacobian count, and do not call f
            assert f.calls < stats.evaluations
        else:
            assert f.calls == stats.evaluations
        assert f.rows == f.calls * case.batch  # without batch_dims the batch is never split

    def test_keeps_structure_shape_dtype_and_device(self, case: Case) -> None:
        problem, _, _, (z, stats) = solve(case)
        leaves, spec = tree_flatten(z)
        leaves0, spec0 = tree_flatten(problem.z0)
        assert spec == spec0
        for leaf, leaf0 in zip(leaves, leaves0, strict=True):
            assert (leaf.shape, leaf.dtype, leaf.device) == (leaf0.shape, leaf0.dtype, leaf0.device)
        for value, dtype in (
            (stats.residual, case.dtype),
            (stats.relative, case.dtype),
            (stats.steps, torch.int64),
            (stats.status, torch.int8),
        ):
            assert (value.shape, value.dtype, value.device) == ((case.batch,), dtype, leaves0[0].device)
        assert type(stats.evaluations) is int
        assert stats.trace is None
        assert stats.steps.max() < stats.evaluations

    def test_is_deterministic(self, case: Case) -> None:
        problem, stopping, _, (z, stats) = solve(case)
        again = fixed_point(problem.f, problem.z0, *problem.args, solver=SOLVERS[case.solver], stopping=stopping)
        assert torch.equal(flat(z), flat(again.z))
        assert torch.equal(stats.residual, again.stats.residual)
        assert stats.evaluations == again.stats.evaluations


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("norm", [l2, linf, rms, lambda r: 2 * r.abs().sum(1)], ids=["l2", "linf", "rms", "own"])
def test_any_norm_may_measure_the_residual(solver: str, norm: Any) -> None:
    problem = PROBLEMS["affine"](3, (2, 3), torch.float64)
    stopping = Stopping(rtol=1e-8, max_evals=300, norm=norm)
    z, stats = fixed_point(problem.f, problem.z0, *problem.args, solver=SOLVERS[solver], stopping=stopping)
    residual, scale = norm(residual_of(problem.f, z, *problem.args)), norm(flat(problem.f(z, *problem.args)))
    assert stats.converged.all()
    assert (residual <= 1e-8 * scale + 1e-9).all()
    assert torch.allclose(stats.residual, residual, rtol=1e-6, atol=0)
    assert torch.allclose(stats.relative, residual / scale, rtol=1e-6, atol=0)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_default_dtype_plays_no_part(solver: str, dtype: torch.dtype, default_float64: None) -> None:
    problem = PROBLEMS["affine"](3, (5,), dtype)
    stopping = Stopping(rtol=2e-2, max_evals=100)
    A, b = (arg.clone().requires_grad_() for arg in problem.args)
    z, stats = fixed_point(problem.f, problem.z0, A, b, solver=SOLVERS[solver], stopping=stopping)
    assert z.dtype == dtype
    assert stats.residual.dtype == stats.relative.dtype == torch.float32
    assert stats.converged.all()
    for gradient in torch.autograd.grad(z.sum(), (A, b)):
        assert gradient.dtype == dtype
        assert gradient.isfinite().all()


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("adjoint", [Implicit(), Unrolled()], ids=["implicit", "unrolled"])
def test_autocast_is_for_f_alone(solver: str, adjoint: Any) -> None:
    """The solver's own algebra is not rounded to bfloat16: where f has nothing to cast, all is as without autocast."""
    problem = PROBLEMS["one_hard"](3, (2, 3), torch.float32)
    stopping = Stopping(rtol=1e-5, max_evals=1000)
    args = [arg.clone().requires_grad_() for arg in problem.args]

    def solve() -> Solution:
        return fixed_point(problem.f, problem.z0, *args, solver=SOLVERS[solver], stopping=stopping, adjoint=adjoint)

    plain = solve()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = solve()
    assert torch.equal(plain.z, cast.z)
    assert plain.stats.evaluations == cast.stats.evaluations


@pytest.mark.parametrize(
    "solver", ["picard", "anderson", "broyden", "broyden-line-search", "newton-krylov", "jacobian-free"]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_state(solver: str, dtype: torch.dtype) -> None:
    """The state keeps its dtype; norms are float32 and belong to it."""
    problem = PROBLEMS["tanh_contraction"](3, (5,), dtype)
    stopping = Stopping(rtol=2e-2, max_evals=100)
    z, stats = fixed_point(problem.f, problem.z0, *problem.args, solver=SOLVERS[solver], stopping=stopping)
    assert z.dtype == dtype
    assert stats.residual.dtype == stats.relative.dtype == torch.float32
    assert stats.converged.all()
    assert torch.allclose(stats.residual, rms(residual_of(problem.f, z, *problem.args)), rtol=1e-5, atol=0)
    scale = l2(flat(z)).double()
    assert (l2(z.double() - problem.exact) <= 1.5 * problem.condition * 2e-2 * scale).all()
