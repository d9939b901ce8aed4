"""What the caller gets when f misbehaves: an honest status, or an error that says why, and nothing else harmed."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import Counted, normal, orthogonal, tanh_map
from torch import Tensor, nn

from equilibria import (
    Anderson,
    Broyden,
    Implicit,
    Neumann,
    NewtonKrylov,
    NonFiniteError,
    Phantom,
    Picard,
    Solution,
    Status,
    Stopping,
    UndeclaredTensorError,
    Unrolled,
    fixed_point,
)

SOLVERS: dict[str, Any] = {
    "picard": Picard(),
    "picard damped": Picard(damping=0.6),
    "anderson": Anderson(),
    "anderson damped": Anderson(damping=0.7),
    "broyden": Broyden(),
    "line search": Broyden(line_search=3),
    "newton": NewtonKrylov(),
}
ADJOINTS: dict[str, Any] = {
    "implicit": Implicit(),
    "phantom": Phantom(steps=2),
    "unrolled": Unrolled(),
    "neumann": Neumann(),
}
each_solver = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
each_adjoint = pytest.mark.parametrize("adjoint", ADJOINTS.values(), ids=ADJOINTS)

W = 0.7 * orthogonal(4)
X = normal(0, 3, 4)
Z0 = torch.zeros(3, 4).double()
TIGHT = Stopping(rtol=1e-9, max_evals=200)


def solve(f: Callable[..., Any], *args: Any, z0: Any = Z0, **options: Any) -> Solution:
    return fixed_point(f, z0, *args, **{"stopping": TIGHT, **options})


class Once:
    """tanh_map, and something else as well at call `at` (0 is the first)."""

    def __init__(self, at: int, act: Callable[[Tensor], Tensor | None]) -> None:
        self.at, self.act, self.calls = at, act, 0

    def __call__(self, z: Tensor, W: Tensor, x: Tensor) -> Tensor:
        out = tanh_map(z, W, x)
        self.calls += 1
        replaced = self.act(z) if self.calls == self.at + 1 else None
        return out if replaced is None else replaced


class TestNotFiniteAtCallK:
    @each_solver
    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
    @pytest.mark.parametrize("at", [0, 1, 5])
    @pytest.mark.parametrize("smaller", [False, True], ids=["whole", "smaller"])
    def test_one_sample_fails_and_no_other(self, solver: Any, bad: float, at: int, smaller: bool) -> None:
        calls = 0

        def f(z: Tensor, W: Tensor, x: Tensor, who: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            return torch.where((who == 1) & (calls > at), bad, tanh_map(z, W, x))

        who = torch.arange(3).unsqueeze(1)
        dims = (None, 0, 0) if smaller else None
        z, stats = solve(f, W, X, who, solver=solver, batch_dims=dims, raise_nonfinite=False)
        clean = solve(tanh_map, W, X, solver=solver)
        assert stats.status.tolist() == [Status.CONVERGED, Status.NONFINITE, Status.CONVERGED]
        assert torch.allclose(z[[0, 2]], clean.z[[0, 2]], rtol=1e-7, atol=1e-8)
        assert z.isfinite().all()
        assert bool(stats.residual[1].isfinite()) == (at > 0)  # the last finite iterate; at z0 there is none before
        assert stats.evaluations >= calls  # more where products with the Jacobian count
        calls = 0
        with pytest.raises(NonFiniteError, match=r"in 1 of 3 samples \(first: sample 1") as caught:
            solve(f, W, X, who, solver=solver, batch_dims=dims)
        assert caught.value.solution is not None
        assert torch.equal(caught.value.solution.z, z)

    @each_solver
    def test_the_others_do_not_pay_for_it(self, solver: Any, request: pytest.FixtureRequest) -> None:
        bad = X.clone()
        bad[1] = float("nan")
        others, stopping = [0, 2], Stopping(rtol=1e-8, max_evals=60)
        alone = solve(tanh_map, W, X[others], z0=Z0[others], solver=solver, stopping=stopping).stats
        beside = solve(tanh_map, W, bad, solver=solver, stopping=stopping, raise_nonfinite=False).stats
        assert torch.equal(beside.status[others], alone.status)
        assert torch.equal(beside.steps[others], alone.steps)
        assert beside.evaluations == alone.evaluations


class Mine(Exception):
    pass


class TestRaisesAtCallK:
    @each_solver
    @each_adjoint
    @pytest.mark.parametrize("error", [Mine("mine"), KeyboardInterrupt(), StopIteration()], ids=repr)
    @pytest.mark.parametrize("at", [0, 3])
    def test_the_error_comes_through_and_the_next_solve_is_as_ever(
        self, solver: Any, adjoint: Any, error: BaseException, at: int
    ) -> None:
        def fail(z: Tensor) -> None:
            raise error

        weight = W.clone().requires_grad_()
        options = {"solver": solver, "adjoint": adjoint}
        before = solve(tanh_map, weight, X, **options)
        f = Once(at, fail)
        with pytest.raises(type(error)) as caught:
            solve(f, weight, X, **options)
        assert caught.value is error
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
        after = solve(f, weight, X, **options)  # the same f, which fails no more
        assert torch.equal(after.z, before.z)
        assert torch.equal(*(torch.autograd.grad(z.sum(), weight)[0] for z in (after.z, before.z)))

    @pytest.mark.parametrize("create_graph", [False, True])
    def test_in_the_backward_pass(self, create_graph: bool) -> None:
        class Layer(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight = nn.Parameter(W.clone())
                self.fails = False

            def forward(self, z: Tensor, x: Tensor) -> Tensor:
                if self.fails:
                    raise Mine("mine")
                return tanh_map(z, self.weight, x)

        layer = Layer()
        weight = layer.weight
        loss = solve(layer, X).z.sum()
        expected = torch.autograd.grad(loss, weight, retain_graph=True)[0]
        layer.fails = True
        with pytest.raises(Mine, match="mine"):
            torch.autograd.grad(loss, weight, create_graph=create_graph, retain_graph=True)
        assert layer.weight is weight
        layer.fails = False
        assert torch.equal(torch.autograd.grad(loss, weight)[0], expected)

    @each_adjoint
    def test_nothing_is_held_after_it(self, adjoint: Any) -> None:
        seen: list[weakref.ref[Tensor]] = []

        def fail(z: Tensor) -> None:
            seen.append(weakref.ref(z))
            raise Mine

        with pytest.raises(Mine):
            solve(Once(2, fail), W.clone().requires_grad_(), X, adjoint=adjoint)
        gc.collect()
        assert seen[0]() is None


class TestWritesIntoItsInput:
    """The first call is checked by `probe` (tests/test_declared.py); a later one does the same harm."""

    @each_solver
    @pytest.mark.parametrize("grad", [False, True])
    def test_at_a_later_call(self, solver: Any, grad: bool) -> None:
        f = Once(3, lambda z: z.mul_(0.5).clone())
        with torch.set_grad_enabled(grad), pytest.raises(ValueError, match="f writes into its argument z"):
            solve(f, W, X, solver=solver)


class TestMemoryOfTheOutput:
    """Whatever memory f returns its value in, the answer is that of f."""

    @pytest.mark.parametrize(("name", "solver"), [item for item in SOLVERS.items() if item[0] != "newton"])
    @each_adjoint
    def test_a_buffer_that_f_overwrites_at_its_next_call(self, name: str, solver: Any, adjoint: Any) -> None:
        """A plain step takes f(z) itself as the next z, which f would then write to; a damped one makes a tensor of its
        own."""
        buffer = torch.empty_like(Z0)
        options = {"solver": solver, "adjoint": adjoint}

        def f(z: Tensor, W: Tensor, x: Tensor) -> Tensor:
            return torch.tanh(z @ W.T + x, out=buffer)

        with torch.no_grad():
            if "damped" not in name:
                with pytest.raises(ValueError, match="memory that the next call overwrites"):
                    solve(f, W, X, **options)
                return
            z, stats = solve(f, W, X, **options)
            expected = solve(tanh_map, W, X, **options).z
        assert stats.converged.all()
        assert torch.allclose(z, expected, rtol=0, atol=1e-8)

    @each_solver
    @pytest.mark.parametrize("layout", ["transposed", "every second", "expanded", "slice of a wider one"])
    @pytest.mark.parametrize("grad", [False, True])
    def test_views(self, solver: Any, layout: str, grad: bool) -> None:
        def f(z: Tensor, W: Tensor, x: Tensor) -> Tensor:
            out = tanh_map(z, W, x)
            if layout == "transposed":
                return out.mT.contiguous().mT
            if layout == "every second":
                return out.repeat_interleave(2, dim=1)[:, ::2]
            if layout == "slice of a wider one":
                return torch.cat((out, out, out), dim=1)[:, 4:8]
            return out.mean(1, keepdim=True).expand_as(out)

        def dense(z: Tensor, W: Tensor, x: Tensor) -> Tensor:
            return f(z, W, x).contiguous()

        found, expected = (self.value_and_gradient(g, solver, grad) for g in (f, dense))
        assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-10) for a, b in zip(found, expected, strict=True))

    @staticmethod
    def value_and_gradient(f: Any, solver: Any, grad: bool) -> list[Tensor]:
        weight = W.clone().requires_grad_(grad)
        z, stats = solve(f, weight, X, solver=solver)
        assert stats.converged.all()
        return [z, *(torch.autograd.grad(z.square().sum(), weight) if grad else ())]


class TestInputs:
    @each_solver
    def test_z0_in_any_memory(self, solver: Any) -> None:
        start = normal(5, 1, 4)
        expected = solve(tanh_map, W, X, solver=solver, z0=start.repeat(3, 1)).z
        for z0 in (start.expand(3, 4), start.repeat(3, 2)[:, :4], start.T.repeat(1, 3).T):
            before = z0.clone()
            assert torch.equal(solve(tanh_map, W, X, solver=solver, z0=z0).z, expected)
            assert torch.equal(z0, before)

    def test_args_of_another_dtype(self) -> None:
        with pytest.raises(
            ValueError, match=r"f returned torch.float64 for z of torch.float32; .* give z0 in torch.float64"
        ):
            solve(lambda z, x: torch.tanh(0.5 * z + x), X, z0=Z0.float())
        z = solve(lambda z, x: torch.tanh(0.5 * z + x).to(z.dtype), X, z0=Z0.float(), stopping=Stopping()).z
        assert z.dtype == torch.float32

    @each_solver
    @pytest.mark.parametrize("shape", [(10_000, 1), (1, 100_000), (10_000,)])
    def test_many_and_wide(self, solver: Any, shape: tuple[int, ...]) -> None:
        z, stats = solve(torch.cos, z0=torch.zeros(shape), solver=solver, stopping=Stopping(rtol=1e-5))
        assert stats.converged.all()
        assert torch.allclose(z, torch.tensor(0.7390851), rtol=0, atol=2e-5)

    @pytest.mark.parametrize("shape", [(), (1,), (3, 1), (4,), (3, 4)])
    def test_a_norm_of_another_shape(self, shape: tuple[int, ...]) -> None:
        """`torch.linalg.norm` itself, say, which is one number for the whole batch."""
        stopping = Stopping(norm=lambda r: r.norm().expand(shape))
        with pytest.raises(ValueError, match=r"norm.*\(B,\)"):
            solve(tanh_map, W, X, stopping=stopping)

    @each_adjoint
    def test_exact_at_once_with_tolerance_zero(self, adjoint: Any) -> None:
        x = torch.ones(3, 4).double().requires_grad_()
        f = Counted(lambda z, x: 0.5 * z + 0.5 * x)
        z, stats = solve(f, x, z0=torch.ones(3, 4).double(), stopping=Stopping(rtol=0, atol=0), adjoint=adjoint)
        assert stats.converged.all()
        assert stats.residual.tolist() == [0.0] * 3
        assert torch.equal(z, torch.ones(3, 4).double())

    @each_solver
    def test_an_f_that_is_another_at_each_call_never_converges(self, solver: Any) -> None:
        calls = 0

        def f(z: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            return 0.5 * z + calls

        stats = solve(f, solver=solver, stopping=Stopping(rtol=1e-6, max_evals=30)).stats
        assert stats.status.tolist() == [Status.EXHAUSTED] * 3
        assert calls <= stats.evaluations == 30

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_an_f_that_switches_gradients_off(self, mode: Any) -> None:
        """Its value is had; its gradient, asked for, is not silently none."""

        def f(z: Tensor, W: Tensor, x: Tensor) -> Tensor:
            with mode():
                return tanh_map(z, W, x)

        weight = W.clone().requires_grad_()
        z = solve(f, weight, X).z
        assert torch.equal(z, solve(tanh_map, W, X).z)
        assert not z.is_inference()
        with pytest.raises(UndeclaredTensorError, match=r"carries no gradient.*runs under torch.no_grad\(\), or detaches"):
            torch.autograd.grad(z.sum(), weight, allow_unused=True)
