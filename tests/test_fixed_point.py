"""fixed_point as its user sees it: what it returns, whatever the adjoint, and what it does not take."""

from __future__ import annotations

import subprocess
import sys
from typing import Any, NamedTuple

import pytest
import torch
from problems import PROBLEMS, Counted, affine_map, flat, normal, orthogonal, residual_of, tanh_map
from torch import Tensor, nn

import equilibria
from equilibria import (
    GMRES,
    Anderson,
    Broyden,
    Implicit,
    NewtonKrylov,
    NonFiniteError,
    Phantom,
    Picard,
    Solution,
    Stats,
    Status,
    Stopping,
    Unrolled,
    fixed_point,
)
from equilibria.stopping import rms

SOLVERS: dict[str, Any] = {
    "picard": Picard(),
    "anderson": Anderson(),
    "broyden": Broyden(),
    "line search": Broyden(line_search=3),
}
ADJOINTS: dict[str, Any] = {"implicit": Implicit(), "phantom": Phantom(steps=3, damping=0.5), "unrolled": Unrolled()}
each_solver = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
each_adjoint = pytest.mark.parametrize("adjoint", ADJOINTS.values(), ids=ADJOINTS)

W = 0.8 * orthogonal(4)
X = normal(0, 3, 4)
Z0 = torch.zeros(3, 4).double()


class TestTrainingAndEvaluation:
    @each_solver
    @each_adjoint
    @pytest.mark.parametrize("name", ["tanh_contraction", "nested", "one_hard", "tanh_expansion"])
    @pytest.mark.parametrize("max_evals", [4, 60], ids=["exhausted", "converged"])
    def test_return_the_same(self, solver: Any, adjoint: Any, name: str, max_evals: int) -> None:
        """Bit for bit: z, residual, steps and status, whether gradients are recorded or not."""
        problem = PROBLEMS[name](3, (5,), torch.float64)
        stopping = Stopping(rtol=1e-5, max_evals=max_evals)
        args = [arg.clone().requires_grad_() for arg in problem.args]

        def solve() -> Solution:
            return fixed_point(problem.f, problem.z0, *args, solver=solver, stopping=stopping, adjoint=adjoint)

        training = solve()
        with torch.no_grad():
            evaluation = solve()
        with torch.inference_mode():
            inference = solve()
        if bool(training.stats.steps.all()) and not torch.equal(flat(training.z), flat(problem.z0)):
            assert flat(training.z).requires_grad
        for other in (evaluation, inference):
            assert not flat(other.z).requires_grad
            assert torch.equal(flat(training.z), flat(other.z))
            assert torch.equal(training.stats.residual, other.stats.residual)
            assert torch.equal(training.stats.steps, other.stats.steps)
            assert torch.equal(training.stats.status, other.stats.status)
        extra = adjoint.steps if isinstance(adjoint, Phantom) else 0
        assert training.stats.evaluations == evaluation.stats.evaluations + extra
        measured = rms(residual_of(problem.f, training.z, *args))
        assert torch.allclose(training.stats.residual, measured, rtol=1e-9, atol=1e-15)

    @each_adjoint
    def test_statistics_carry_no_graph(self, adjoint: Any) -> None:
        stats = fixed_point(tanh_map, Z0, W.clone().requires_grad_(), X, adjoint=adjoint,
                            stopping=Stopping(trace=True)).stats  # fmt: skip
        assert stats.trace is not None
        for value in (stats.residual, stats.relative, stats.steps, stats.status, stats.trace):
            assert not value.requires_grad

    @each_adjoint
    @pytest.mark.parametrize("grad", [True, False])
    def test_leaves_its_inputs_alone(self, adjoint: Any, grad: bool) -> None:
        z0, weight, x = Z0.clone(), W.clone().requires_grad_(grad), X.clone()
        before = [value.detach().clone() for value in (z0, weight, x)]
        z = fixed_point(tanh_map, z0, weight, x, adjoint=adjoint).z
        if grad:
            z.sum().backward()
        assert all(torch.equal(a, b) for a, b in zip(before, (z0, weight, x), strict=True))

    @each_adjoint
    @pytest.mark.parametrize("start", [0.0, 1.0])
    def test_what_is_returned_may_be_written_to(self, adjoint: Any, start: float) -> None:
        """z shares no memory with z0 or with args, even where one of them is the answer."""
        z0, ones = torch.full((2, 3), start), torch.ones(2, 3)
        for f in (lambda z, x: x, lambda z, x: z, lambda z, x: x.clone()):
            z = fixed_point(f, z0, ones, solver=Picard(), adjoint=adjoint).z
            z.fill_(7.0)
            assert torch.equal(z0, torch.full((2, 3), start))
            assert torch.equal(ones, torch.ones(2, 3))

    @each_adjoint
    def test_every_call_of_f_is_counted(self, adjoint: Any) -> None:
        for weight in (W, W.clone().requires_grad_()):
            f = Counted(tanh_map)
            stats = fixed_point(f, Z0, weight, X, adjoint=adjoint).stats
            extra = 3 if isinstance(adjoint, Phantom) and not weight.requires_grad else 0
            assert stats.evaluations in (f.calls, f.calls - extra)
            assert stats.evaluations == f.calls


class Point(NamedTuple):
    position: Tensor
    parts: list[Tensor]


class TestWhatIsReturned:
    def test_solution_unpacks_and_has_names(self) -> None:
        solution = fixed_point(tanh_map, Z0, W, X)
        z, stats = solution
        assert isinstance(solution, Solution)
        assert isinstance(stats, Stats)
        assert z is solution.z
        assert stats is solution.stats
        assert torch.equal(stats.converged, stats.status == Status.CONVERGED)
        assert torch.allclose(stats.relative, stats.residual / rms(tanh_map(z, W, X)), rtol=1e-9)

    def test_defaults(self) -> None:
        plain = fixed_point(tanh_map, Z0, W, X)
        spelled = fixed_point(tanh_map, Z0, W, X, solver=Anderson(history=5), adjoint=Implicit(),
                              stopping=Stopping(rtol=1e-3, atol=1e-9, max_evals=50, norm=rms, check_every=1))  # fmt: skip
        assert torch.equal(plain.z, spelled.z)
        assert plain.stats.evaluations == spelled.stats.evaluations

    @each_adjoint
    def test_nested_state_keeps_its_types_and_is_attached_whole(self, adjoint: Any) -> None:
        x = normal(3, 2, 3).requires_grad_()

        def f(z: Point, x: Tensor) -> Point:
            return Point(torch.tanh(0.5 * z.parts[0] + x), [0.3 * z.position, 0.2 * z.parts[1] + x.sum(1)])

        z0 = Point(torch.zeros(2, 3).double(), [torch.zeros(2, 3).double(), torch.zeros(2).double()])
        z, stats = fixed_point(f, z0, x, stopping=Stopping(rtol=1e-9), adjoint=adjoint)
        assert type(z) is Point
        assert type(z.parts) is list
        assert stats.residual.shape == (2,)
        assert stats.converged.all()
        assert torch.allclose(z.parts[1], x.sum(1) / 0.8, rtol=1e-7)
        for leaf in (z.position, *z.parts):
            (gradient,) = torch.autograd.grad(leaf.sum(), x, retain_graph=True)
            assert gradient.isfinite().all()
            assert gradient.abs().max() > 0.1

    def test_batch_dims_change_the_cost_alone(self) -> None:
        """With Implicit: the gradient too is that of the whole batch."""
        rates = torch.full((8, 1), 0.1).double()
        rates[3] = 0.97
        x = normal(1, 8, 4)

        def solve(batch_dims: Any) -> tuple[Counted, Solution, list[Tensor]]:
            f = Counted(lambda z, W, rates, x: rates * torch.tanh(z @ W.T + x))
            args = [value.clone().requires_grad_() for value in (W, rates, x)]
            solution = fixed_point(f, 0 * x, *args, batch_dims=batch_dims, stopping=Stopping(rtol=1e-11, max_evals=300),
                                   adjoint=Implicit(stopping=Stopping(rtol=1e-11)))  # fmt: skip
            rows = f.rows
            gradients = torch.autograd.grad(solution.z.square().sum(), args)
            f.rows = rows
            return f, solution, list(gradients)

        (whole, solution, gradients), (smaller, solution_smaller, gradients_smaller) = solve(None), solve((None, 0, 0))
        assert smaller.rows < whole.rows
        assert torch.allclose(solution.z, solution_smaller.z, rtol=1e-9, atol=1e-11)
        for a, b in zip(gradients, gradients_smaller, strict=True):
            assert torch.allclose(a, b, rtol=1e-8, atol=1e-10)


class TestNonFinite:
    @staticmethod
    def growing(z: Tensor, rate: Tensor) -> Tensor:
        return rate * z**2 + 0.1

    rates = torch.tensor([[0.5], [50.0], [0.2]]).double()
    z0 = torch.full((3, 2), 0.5).double()

    @each_adjoint
    def test_raises_with_the_solution(self, adjoint: Any) -> None:
        with pytest.raises(NonFiniteError, match=r"in 1 of 3 samples \(first: sample 1; earliest at step \d+\)") as caught:
            fixed_point(self.growing, self.z0, self.rates, solver=Picard(), adjoint=adjoint)
        solution = caught.value.solution
        assert solution is not None
        assert solution.z.shape == (3, 2)
        assert solution.z.isfinite().all()
        assert solution.stats.status[1] == Status.NONFINITE
        assert solution.stats.evaluations > 1

    @each_adjoint
    def test_returned_as_a_status(self, adjoint: Any) -> None:
        z, stats = fixed_point(self.growing, self.z0, self.rates, solver=Picard(), adjoint=adjoint, raise_nonfinite=False)
        assert stats.status.tolist() == [Status.CONVERGED, Status.NONFINITE, Status.CONVERGED]
        assert z.isfinite().all()
        assert stats.residual.isfinite().all()
        measured = rms(self.growing(z, self.rates) - z)
        assert torch.allclose(stats.residual, measured, rtol=1e-9)

    def test_gradients_of_the_samples_that_converged(self) -> None:
        """A sample that failed passes on the gradient at the z returned for it, and none of it reaches the others."""
        rates = self.rates.clone().requires_grad_()
        z = fixed_point(self.growing, self.z0, rates, solver=Picard(), raise_nonfinite=False,
                        stopping=Stopping(rtol=1e-10)).z  # fmt: skip
        (gradient,) = torch.autograd.grad(z[[0, 2]].sum(), rates)
        slope = (z**2 / (1 - 2 * rates * z)).sum(1, keepdim=True)
        assert torch.allclose(gradient[[0, 2]], slope[[0, 2]], rtol=1e-3)
        assert gradient[1] == 0


class TestMisuse:
    @pytest.mark.parametrize(
        ("option", "value", "words"),
        [
            ("solver", "anderson", r"solver='anderson' is no solver; give an object such as Anderson\(\)"),
            ("solver", Anderson, r"solver=<class .*Anderson'> is no solver; give an object such as Anderson\(\)"),
            ("solver", Stopping(), r"solver=Stopping\(.*\) is no solver"),
            ("solver", "", r"solver='' is no solver"),
            ("stopping", 1e-3, r"stopping=0.001 is no stopping; give an object such as Stopping\(rtol=1e-3\)"),
            ("stopping", 0, "stopping=0 is no stopping"),
            ("stopping", Stopping, "stopping=<class .*Stopping'> is no stopping"),
            ("adjoint", "implicit", r"adjoint='implicit' is no adjoint; give an object such as Implicit\(\)"),
            ("adjoint", Implicit, "adjoint=<class .*Implicit'> is no adjoint"),
            ("adjoint", False, "adjoint=False is no adjoint"),
        ],
    )
    def test_what_is_no_solver_stopping_or_adjoint(self, option: str, value: Any, words: str) -> None:
        f = Counted(tanh_map)
        options: dict[str, Any] = {option: value}
        with pytest.raises(TypeError, match=words):
            fixed_point(f, Z0, W, X, **options)
        assert f.calls == 0

    @pytest.mark.parametrize("name", ["tol", "max_iter", "rtol", "threshold", "options"])
    def test_no_keyword_is_swallowed(self, name: str) -> None:
        options: dict[str, Any] = {name: 1}
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
            fixed_point(tanh_map, Z0, W, X, **options)

    @pytest.mark.parametrize(
        "kind", [Picard, Anderson, Broyden, NewtonKrylov, GMRES, Stopping, Implicit, Phantom, Unrolled]
    )
    def test_nor_by_anything_it_takes(self, kind: Any) -> None:
        with pytest.raises(TypeError, match="unexpected keyword argument 'tol'"):
            kind(tol=1e-3)
        with pytest.raises(TypeError, match="positional argument"):
            kind(0.5)

    @pytest.mark.parametrize(
        ("make", "words"),
        [
            (lambda: Picard(damping=0.0), r"Picard\(damping=0.0\): damping must lie in \(0, 2\]"),
            (lambda: Picard(damping=float("nan")), r"Picard\(damping=nan\)"),
            (lambda: Anderson(history=0), r"Anderson\(history=0\): history must be an integer >= 1"),
            (lambda: Anderson(damping=3.0), r"Anderson\(damping=3.0\)"),
            (lambda: Anderson(ridge=-1.0), r"Anderson\(ridge=-1.0\): ridge must be >= 0, or None"),
            (lambda: Broyden(history=2.0), r"Broyden\(history=2.0\): history must be an integer >= 1"),  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
            (lambda: Broyden(line_search=-1), r"Broyden\(line_search=-1\): line_search must be an integer >= 0"),
            (lambda: NewtonKrylov(max_krylov=0), r"NewtonKrylov\(max_krylov=0\): max_krylov must be an integer >= 1"),
            (lambda: NewtonKrylov(forcing=1.0), r"NewtonKrylov\(forcing=1.0\): forcing must lie in \[0, 1\), or be None"),
            (lambda: NewtonKrylov(line_search=-1), r"NewtonKrylov\(line_search=-1\): line_search must be an integer >= 0"),
            (lambda: GMRES(restart=0), r"GMRES\(restart=0\): restart must be an integer >= 1"),
            (lambda: GMRES(keep=-1), r"GMRES\(keep=-1\): keep must be an integer >= 0"),
        ],
    )
    def test_options_out_of_range(self, make: Any, words: str) -> None:
        with pytest.raises(ValueError, match=words):
            make()

    def test_an_error_of_f_is_its_own(self) -> None:
        def f(z: Tensor) -> Tensor:
            raise KeyError("mine")

        with pytest.raises(KeyError, match="mine"):
            fixed_point(f, Z0)

    def test_f_is_given_what_was_passed(self) -> None:
        with pytest.raises(TypeError, match=r"tanh_map\(\) missing 1 required positional argument: 'x'"):
            fixed_point(tanh_map, Z0, W)


class TestModules:
    """Parameters and buffers of f count as passed."""

    class Scaled(nn.Module):
        scale: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(W.clone())
            self.tied = self.weight
            self.register_buffer("scale", torch.full((4,), 0.5).double())

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return self.scale * torch.tanh(z @ self.tied.T + x)

        def twice(self, z: Tensor, x: Tensor) -> Tensor:
            return self(self(z, x), x)

    @each_adjoint
    @pytest.mark.parametrize("method", ["__call__", "forward", "twice"])
    def test_gradients_equal_those_of_the_function(self, adjoint: Any, method: str) -> None:
        module = self.Scaled()
        f = module if method == "__call__" else getattr(module, method)
        stopping = Stopping(rtol=1e-10)
        z = fixed_point(f, Z0, X, adjoint=adjoint, stopping=stopping).z
        z.square().sum().backward()

        def plain(z: Tensor, W: Tensor, x: Tensor) -> Tensor:
            once = 0.5 * torch.tanh(z @ W.T + x)
            return once if method != "twice" else 0.5 * torch.tanh(once @ W.T + x)

        weight = W.clone().requires_grad_()
        expected = fixed_point(plain, Z0, weight, X, adjoint=adjoint, stopping=stopping).z
        assert torch.equal(z, expected)
        assert module.weight.grad is not None
        assert torch.allclose(
            module.weight.grad, torch.autograd.grad(expected.square().sum(), weight)[0], rtol=1e-9, atol=1e-12
        )

    def test_a_buffer_that_requires_grad(self) -> None:
        module = self.Scaled()
        module.scale.requires_grad_()
        z = fixed_point(module, Z0, X).z
        assert torch.autograd.grad(z.sum(), module.scale)[0].abs().min() > 0

    def test_a_frozen_module_needs_no_backward(self) -> None:
        module = self.Scaled().requires_grad_(False)
        assert not fixed_point(module, Z0, X).z.requires_grad


class TestPublicNames:
    def test_are_there(self) -> None:
        for name in equilibria.__all__:
            assert hasattr(equilibria, name), name
        assert {
            "fixed_point", "Solution", "Stats", "Status", "Stopping", "Picard", "Anderson", "Broyden", "GMRES",
            "NewtonKrylov", "PeacemanRachford",
            "Implicit", "Phantom", "Unrolled", "DEQ", "NonFiniteError", "UndeclaredTensorError", "RandomMapError",
        } <= set(equilibria.__all__)  # fmt: skip

    def test_import_loads_torch_alone(self) -> None:
        """No package of the extras comes in with the library itself."""
        code = (
            "import sys, torch; before = {name.partition('.')[0] for name in sys.modules}; import equilibria; "
            "import equilibria.models; after = {name.partition('.')[0] for name in sys.modules}; "
            "print(sorted(after - before - set(sys.stdlib_module_names)))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "['equilibria']"


def test_affine_by_gmres_in_front_of_a_user() -> None:
    A, b = (0.9 * orthogonal(4)).requires_grad_(), X.clone().requires_grad_()
    stopping = Stopping(rtol=1e-10)
    z, stats = fixed_point(affine_map, Z0, A, b, solver=GMRES(), stopping=stopping, adjoint=Implicit(stopping=stopping))
    assert stats.converged.all()
    of_b = torch.autograd.grad(z.sum(), b)[0]
    exact = torch.linalg.solve((torch.eye(4).double() - A).mT, torch.ones(4, 1).double()).mT
    assert torch.allclose(of_b, exact.expand(3, 4), rtol=1e-8)
