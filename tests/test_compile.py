"""torch.compile: a compiled map inside an eager solve, and a whole solve as one graph."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import problems
import pytest
import torch
from problems import normal, orthogonal
from torch import Tensor, nn
from torch._dynamo.exc import Unsupported
from torch._dynamo.utils import counters
from torch._functorch import config
from torch._inductor import config as inductor
from torch.utils._pytree import tree_leaves

from equilibria import (
    DEQ,
    GMRES,
    Anderson,
    Broyden,
    Implicit,
    Neumann,
    Phantom,
    Picard,
    RandomMapError,
    ReversiblePicard,
    Shine,
    Solution,
    Status,
    Stopping,
    UndeclaredTensorError,
    Unrolled,
    fixed_point,
)
from equilibria.graph.settings import LeanLoops
from equilibria.solvers import Solver

# What the compiler itself warns of, also for functions that know nothing of this library.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch._prims_common.check`:FutureWarning"),
]
needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="the inductor backend needs a C++ compiler"
)
STOPPING = Stopping(rtol=1e-9, max_evals=60)


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def tanh_map(z: Tensor, W: Tensor, x: Tensor) -> Tensor:
    # The record of the sine belongs to nobody else, so that a compiled backward pass may take it ("donated buffers").
    return 0.5 * torch.tanh(torch.sin(z @ W) + x)


def problem(batch: int = 3, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """z0, W (which requires a gradient) and x."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 6, generator=draw, dtype=torch.float64) * torch.logspace(-2, 1, batch).unsqueeze(1)
    W = torch.randn(6, 6, generator=draw, dtype=torch.float64)
    return torch.zeros_like(x), (0.9 * W / torch.linalg.matrix_norm(W, 2)).requires_grad_(), x


class Cell(nn.Module):
    """A block with everything a block may have: weights, a buffer, and a part that is computed once."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.outer = nn.Linear(6, 6), nn.Linear(4, 6)
        self.register_buffer("scale", torch.tensor(0.4))
        self.double()

    def initial(self, x: Tensor) -> Tensor:
        return x.new_zeros(len(x), 6)

    def prepare(self, x: Tensor) -> tuple[Tensor]:
        return (self.outer(x),)

    def forward(self, z: Tensor, u: Tensor) -> Tensor:
        return torch.tanh(self.scale * torch.sin(self.inner(z)) + u)

    def update(self, z: Tensor, u: Tensor) -> Tensor:
        return self(z, u)


ADJOINT = Implicit(solver=Anderson(), stopping=STOPPING)
"""With a backward solve that a graph can hold."""


def products(run: Callable[[], Any]) -> tuple[Any, int]:
    """What it returns, and how many matrix products it took."""
    with torch.profiler.profile() as seen:
        found = run()
    return found, sum(event.count for event in seen.key_averages() if event.key in ("aten::mm", "aten::addmm"))


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


class TestCompiledMap:
    """f is compiled, the solve around it is not."""

    @pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=needs_compiler)])
    def test_solution_and_gradient_are_those_of_the_map_itself(self, backend: str) -> None:
        z0, W, x = problem()
        adjoint = Implicit(stopping=STOPPING)
        got, want = (
            fixed_point(f, z0, W, x, stopping=STOPPING, adjoint=adjoint)
            for f in (torch.compile(tanh_map, backend=backend), tanh_map)
        )
        torch.testing.assert_close(got.z, want.z, rtol=1e-9, atol=1e-9)
        gradients = [torch.autograd.grad(z.square().sum(), W)[0] for z in (got.z, want.z)]
        torch.testing.assert_close(*gradients, rtol=1e-7, atol=1e-7)

    def test_is_compiled_once_for_each_way_it_is_called(self) -> None:
        """Three graphs: what has no gradient, the first look at f, and the record of the backward pass."""
        f = torch.compile(tanh_map, backend="aot_eager")

        def train_and_evaluate(batch: int, seed: int) -> None:
            z0, W, x = problem(batch, seed)
            injected = x * torch.ones((), dtype=torch.float64, requires_grad=True)
            fixed_point(f, z0, W, injected).z.sum().backward()
            with torch.no_grad():
                fixed_point(f, z0, W, x)

        train_and_evaluate(3, seed=0)
        assert graphs() == 3
        with torch._dynamo.config.patch(error_on_recompile=True):
            train_and_evaluate(3, seed=1)
        train_and_evaluate(5, seed=2)  # once more for every other batch size
        assert graphs() == 6
        with torch._dynamo.config.patch(error_on_recompile=True):
            train_and_evaluate(7, seed=3)

    @pytest.mark.parametrize("how", ["torch.compile(block)", "block.compile()", "torch.compile(block.update)"])
    def test_block_keeps_the_gradients_of_its_parameters(self, how: str) -> None:
        cell, x = Cell(), torch.randn(3, 4, dtype=torch.float64)
        z, _ = DEQ(cell, stopping=STOPPING)(x)
        want = torch.autograd.grad(z.square().sum(), list(cell.parameters()))
        if how == "torch.compile(block)":
            z, _ = DEQ(torch.compile(cell, backend="aot_eager"), stopping=STOPPING)(x)  # type: ignore[arg-type]
        elif how == "block.compile()":
            cell.compile(backend="aot_eager")
            z, _ = DEQ(cell, stopping=STOPPING)(x)
        else:
            f = torch.compile(cell.update, backend="aot_eager")
            z, _ = fixed_point(f, cell.initial(x), *cell.prepare(x), stopping=STOPPING)
        got = torch.autograd.grad(z.square().sum(), list(cell.parameters()))
        assert graphs() > 0
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)

    def test_replays_its_record_without_leaving_the_compiled_code(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.compiler, "set_stance", None)  # the way out must not be needed
        z0, W, x = problem()
        z, stats = fixed_point(torch.compile(tanh_map, backend="aot_eager", dynamic=True), z0, W, x)
        z.sum().backward()
        assert stats.backward[0].evaluations > 2

    def test_may_have_been_compiled_elsewhere_for_one_backward_pass(self) -> None:
        z0, W, x = problem()
        f = torch.compile(tanh_map, backend="aot_eager", dynamic=True)
        leaf = z0.clone().requires_grad_()
        f(leaf, W, x).sum().backward()  # donates its buffers
        with pytest.raises(RuntimeError, match="donated buffers"):
            f(leaf, W, x).sum().backward(retain_graph=True)
        got, want = (fixed_point(h, z0, W, x, stopping=STOPPING).z for h in (f, tanh_map))
        gradients = [torch.autograd.grad(z.square().sum(), W)[0] for z in (got, want)]
        torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("adjoint", [Phantom(steps=2), Unrolled(), Shine(), Neumann()], ids=repr)
    def test_serves_other_adjoints(self, adjoint: Any) -> None:
        z0, W, x = problem()
        f = torch.compile(tanh_map, backend="aot_eager")
        got, want = (fixed_point(h, z0, W, x, adjoint=adjoint).z for h in (f, tanh_map))
        gradients = [torch.autograd.grad(z.square().sum(), W)[0] for z in (got, want)]
        torch.testing.assert_close(*gradients)

    def test_higher_derivatives_and_transforms_run_the_map_itself(self) -> None:
        """The compiler has no second derivatives; a transform takes them of the function that was compiled."""
        z0, W, x = problem()
        adjoint = Implicit(stopping=STOPPING)

        def loss(f: Callable[..., Tensor], x: Tensor) -> Tensor:
            return fixed_point(f, z0[: len(x)], W.detach(), x, stopping=STOPPING, adjoint=adjoint).z.square().sum()

        def twice(f: Callable[..., Tensor]) -> Tensor:
            leaf = x.clone().requires_grad_()
            (first,) = torch.autograd.grad(loss(f, leaf), leaf, create_graph=True)
            return torch.autograd.grad(first.square().sum(), leaf)[0]

        f = torch.compile(tanh_map, backend="aot_eager")
        torch.testing.assert_close(twice(f), twice(tanh_map), rtol=1e-6, atol=1e-6)
        for transform in (torch.func.grad, torch.func.hessian):
            got, want = (transform(lambda x, h=h: loss(h, x))(x[:1]) for h in (f, tanh_map))
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
        got, want = (torch.vmap(lambda x, h=h: loss(h, x.unsqueeze(0)))(x) for h in (f, tanh_map))
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)

    def test_is_checked_like_any_other_map(self) -> None:
        z0, W, x = problem()

        def forgets(z: Tensor) -> Tensor:
            return tanh_map(z, W, x)

        with pytest.raises(UndeclaredTensorError, match="`W` of shape"):
            fixed_point(torch.compile(forgets, backend="aot_eager"), z0)
        with pytest.raises(RandomMapError):
            fixed_point(torch.compile(lambda z: 0.5 * z + torch.randn_like(z), backend="aot_eager"), z0)
        with pytest.raises(ValueError, match="writes into its argument"):
            fixed_point(torch.compile(lambda z: z.mul_(0.5), backend="aot_eager"), z0)


def solved_alike(got: Solution, want: Solution) -> None:
    for here, there in zip(tree_leaves(got.z), tree_leaves(want.z), strict=True):
        torch.testing.assert_close(here, there)
    torch.testing.assert_close(got.stats.residual, want.stats.residual, rtol=1e-2, atol=1e-7)
    assert type(got.stats.evaluations) is int
    assert got.stats.evaluations == want.stats.evaluations
    assert got.stats.steps.tolist() == want.stats.steps.tolist()
    assert got.stats.status.tolist() == want.stats.status.tolist()
    assert got.stats.status.dtype == want.stats.status.dtype


class Pair(NamedTuple):
    a: Tensor
    b: Tensor


def nested_map(z: dict[str, Any], x: Tensor) -> dict[str, Any]:
    a, b = z["pair"]
    return {"pair": Pair(0.5 * torch.cos(b.unsqueeze(1) + x), 0.3 * a.sum(1)), "c": 0.5 * torch.sin(z["c"] + a.mean(1))}


class TestWholeSolve:
    """torch.compile(..., fullgraph=True) around fixed_point: the loop is part of the graph."""

    @pytest.mark.parametrize(
        ("solver", "batch"),
        [
            (Picard(), 3),
            (Picard(damping=0.7), 1),
            (ReversiblePicard(damping=0.9), 3),
            (Anderson(), 3),
            (Anderson(history=2, damping=0.8), 1),
            (Broyden(), 1),
            (Broyden(history=2), 3),
        ],
        ids=repr,
    )
    def test_is_the_eager_solve(self, solver: Solver[Any], batch: int) -> None:
        z0, W, x = problem(batch)

        @torch.no_grad()
        def solve(x: Tensor) -> Solution:
            return fixed_point(tanh_map, z0, W, x, solver=solver, stopping=Stopping(rtol=1e-6))

        want = solve(x)
        assert bool(want.stats.converged.all())
        assert batch == 1 or want.stats.steps.unique().numel() > 1, "samples that stop at different steps"
        compiled = torch.compile(solve, fullgraph=True, backend="aot_eager")
        solved_alike(compiled(x), want)
        with torch._dynamo.config.patch(error_on_recompile=True):  # how many steps it takes is found when it runs
            solved_alike(compiled(0.1 * x), solve(0.1 * x))
        assert graphs() == 1

    @needs_compiler
    def test_runs_as_machine_code(self) -> None:
        z0, W, x = problem()

        @torch.no_grad()
        def solve(x: Tensor) -> Solution:
            return fixed_point(tanh_map, z0, W, x, solver=Anderson(type=2), stopping=Stopping(rtol=1e-6))

        solved_alike(torch.compile(solve, fullgraph=True)(x), solve(x))

    @needs_compiler
    def test_one_sample_runs_as_machine_code(self) -> None:
        """A batch of 1 has strides that mean nothing, of which a loop demands that they stay the same."""
        z0, W, x = problem(1)

        def solve() -> list[Tensor]:
            solvers = (Anderson(type=2, history=3), Broyden(history=3))
            return [fixed_point(tanh_map, z0, W.detach(), x, solver=solver, stopping=STOPPING).z for solver in solvers]

        torch.testing.assert_close(torch.compile(solve, fullgraph=True)(), solve())

    def test_anderson_passes_where_its_type_two_stalls(self) -> None:
        """Which samples have stalled is not known while the graph is traced."""
        W, x = 2.0 * orthogonal(32, seed=6), normal(106, 8, 32)

        def converged(solver: Anderson) -> Tensor:
            solve = torch.no_grad()(lambda x: fixed_point(problems.tanh_map, 0 * x, W, x, solver=solver, stopping=stopping))
            return torch.compile(solve, fullgraph=True, backend="eager")(x).stats.converged

        stopping = Stopping(rtol=1e-8, max_evals=200)
        assert converged(Anderson()).all()
        assert not converged(Anderson(type=2)).all()

    def test_autocast_is_for_the_map_alone(self) -> None:
        deq, x = DEQ(Cell().float()).eval(), torch.randn(3, 4)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            want = deq(x)
            solved_alike(torch.compile(deq, fullgraph=True, backend="eager")(x), want)
        assert want.z.dtype == torch.float32
        assert bool(want.stats.converged.all())

    def test_nested_states(self) -> None:
        x = torch.linspace(-1, 1, 6).reshape(2, 3)
        z0 = {"pair": Pair(torch.zeros(2, 3), torch.zeros(2)), "c": torch.zeros(2)}

        @torch.no_grad()
        def solve(x: Tensor) -> Solution:
            return fixed_point(nested_map, z0, x, stopping=Stopping(rtol=1e-5))

        got = torch.compile(solve, fullgraph=True, backend="eager")(x)
        assert type(got.z["pair"]) is Pair
        solved_alike(got, solve(x))

    @pytest.mark.filterwarnings("ignore:Use of .*set_grad_enabled:UserWarning")
    def test_can_be_exported(self) -> None:
        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.deq = DEQ(Cell(), stopping=Stopping(rtol=1e-6))

            def forward(self, x: Tensor) -> Tensor:
                return self.deq(x)[0]

        model, x = Model().eval(), torch.randn(3, 4, dtype=torch.float64)
        with torch.no_grad():
            program = torch.export.export(model, (x,))
            torch.testing.assert_close(program.module()(2 * x), model(2 * x))

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_module_in_evaluation(self, mode: Callable[[], Any]) -> None:
        deq, x = DEQ(Cell(), stopping=STOPPING, eval_stopping=Stopping(rtol=1e-4)).eval(), torch.randn(3, 4).double()
        with mode():
            compiled = torch.compile(deq, fullgraph=True, backend="eager")
            solved_alike(compiled(x), deq(x))
            with torch.no_grad():
                deq.block.inner.weight.mul_(0.5)  # type: ignore[union-attr]
            solved_alike(compiled(x), deq(x))

    @pytest.mark.parametrize(
        "f",
        [lambda z, x: z, lambda z, x: x, lambda z, x: x.mT.mT, lambda z, x: (0.5 * z + x).mT.contiguous().mT],
        ids=["z", "x", "view of x", "other strides"],
    )
    def test_maps_that_return_what_they_were_given(self, f: Callable[..., Tensor]) -> None:
        @torch.no_grad()
        def solve(x: Tensor) -> Solution:
            return fixed_point(f, torch.zeros_like(x), x, solver=Picard())

        x = torch.ones(2, 3)
        solved_alike(torch.compile(solve, fullgraph=True, backend="eager")(x), solve(x))

    def test_every_status_is_returned(self) -> None:
        x = torch.tensor([[0.5, 0.5], [2.0, 0.5], [1.0, 1.0]])  # converges, becomes NaN, runs out of budget

        @torch.no_grad()
        def solve(x: Tensor, **options: Any) -> Solution:
            def f(z: Tensor) -> Tensor:
                grown = torch.where((x > 1) & (z > 1.5), torch.nan, 0.5 * z + x)
                return torch.where(x == 1, -z + 1, grown)

            return fixed_point(f, torch.zeros_like(x), solver=Picard(), **options)

        z, stats = got = torch.compile(solve, fullgraph=True, backend="eager")(x)
        assert stats.status.tolist() == [Status.CONVERGED, Status.NONFINITE, Status.EXHAUSTED]
        assert bool(z.isfinite().all())
        solved_alike(got, solve(x, raise_nonfinite=False))

    def test_budget_holds(self) -> None:
        z0, W, x = problem()

        @torch.no_grad()
        def solve(x: Tensor, max_evals: int) -> Solution:
            return fixed_point(tanh_map, z0, W, x, stopping=Stopping(rtol=0, max_evals=max_evals))

        compiled = torch.compile(solve, fullgraph=True, backend="eager")
        for max_evals in (1, 7):
            assert compiled(x, max_evals).stats.evaluations == max_evals
            solved_alike(compiled(x, max_evals), solve(x, max_evals))

    def test_gradients_are_refused_with_the_remedy(self) -> None:
        z0, W, x = problem()
        passed, owned = (lambda x: fixed_point(tanh_map, z0, W, x)), DEQ(Cell(), adjoint=Phantom())
        for solve, inputs in ((passed, x), (owned, torch.randn(3, 4).double())):
            with pytest.raises(
                Unsupported, match=r"with adjoint=Implicit\(solver=\.\.\.\) alone, its solver one of Picard"
            ):
                torch.compile(solve, fullgraph=True, backend="eager")(inputs)

    def test_a_gradient_that_would_be_lost_is_refused(self) -> None:
        z0, W, x = problem()

        def solve(x: Tensor) -> Tensor:
            return fixed_point(lambda z, x: tanh_map(z, W, x), z0, x, adjoint=ADJOINT).z

        leaf = x.clone().requires_grad_()
        with pytest.raises(Unsupported, match="f uses a tensor that requires grad but is not passed"):
            torch.compile(solve, fullgraph=True, backend="eager")(leaf)
        with pytest.raises(UndeclaredTensorError, match="`W` of shape"):
            torch.compile(solve, backend="eager")(leaf)

    def test_solvers_that_look_at_values_are_refused_with_the_remedy(self) -> None:
        x = torch.ones(2, 3)
        for options in ({"solver": GMRES()}, {"solver": Broyden(line_search=2)}, {"stopping": Stopping(trace=True)}):

            def solve(x: Tensor, options: Any = options) -> Solution:
                return fixed_point(lambda z, x: 0.5 * z + x, torch.zeros_like(x), x, **options)

            with pytest.raises(Unsupported, match=r"only Picard\(\), .* and Broyden\(\) without line search"):
                torch.compile(solve, fullgraph=True, backend="eager")(x)

    def test_mistakes_are_named(self) -> None:
        with pytest.raises(Unsupported, match=r"f returned shape \(2, 2\) for z of shape \(2, 3\)"):
            torch.compile(lambda z: fixed_point(lambda z: z[:, :2], z), fullgraph=True, backend="eager")(torch.ones(2, 3))

    def test_without_fullgraph_the_solve_leaves_the_graph_and_keeps_its_gradient(self) -> None:
        z0, W, x = problem()

        def model(x: Tensor) -> Tensor:
            return fixed_point(tanh_map, z0, W, 2 * x, stopping=STOPPING).z.square().sum()

        compiled = torch.compile(model, backend="aot_eager")
        torch.testing.assert_close(compiled(x), model(x))
        gradients = [torch.autograd.grad(h(x), W)[0] for h in (compiled, model)]
        torch.testing.assert_close(*gradients)
        seen = graphs()
        compiled(x + 1)
        assert graphs() == seen


class TestWholeGradient:
    """Solve and backward solve, both as loops of a graph."""

    @pytest.mark.parametrize(
        "solver", [Picard(), ReversiblePicard(damping=0.9), Anderson(), Broyden(), Broyden(history=1)], ids=repr
    )
    def test_is_the_eager_gradient(self, solver: Solver[Any]) -> None:
        z0, W, x = problem()
        c = x.clone().requires_grad_()
        stopping = Stopping(rtol=1e-9, max_evals=200)
        adjoint = Implicit(solver=solver, stopping=stopping)

        def loss(W: Tensor, c: Tensor) -> tuple[Tensor, Any]:
            z, stats = fixed_point(tanh_map, z0, W, 2 * c, solver=solver, stopping=stopping, adjoint=adjoint)
            return z.square().sum(), stats

        found = []
        for f in (torch.compile(loss, fullgraph=True, backend="aot_eager"), loss):
            value, stats = f(W, c)
            assert bool(stats.converged.all())
            assert not stats.residual.requires_grad
            found.append([value, *torch.autograd.grad(value, (W, c)), stats.steps])
        torch.testing.assert_close(*found)
        assert graphs() == 1

    def test_of_an_arg_that_is_a_structure_with_constants(self) -> None:
        z0, W, x = problem()

        def loss(W: Tensor) -> Tensor:
            return fixed_point(
                lambda z, a, k: tanh_map(z, k * a["W"], a["x"]), z0, {"W": W, "x": x}, 0.5, adjoint=ADJOINT
            ).z.sum()

        got, want = (
            torch.autograd.grad(f(W), W)[0] for f in (torch.compile(loss, fullgraph=True, backend="aot_eager"), loss)
        )
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)

    @pytest.mark.parametrize("tied", [False, True])
    def test_of_the_parameters_of_a_module(self, tied: bool) -> None:
        cell, x = Cell(), torch.randn(3, 4, dtype=torch.float64)
        if tied:
            cell.second = cell.inner  # a module with two names, and a weight in two places
            cell.third = nn.Linear(6, 6, bias=False).double()
            cell.third.weight = cell.inner.weight
        deq = DEQ(cell, stopping=STOPPING, adjoint=ADJOINT)
        step = lambda x: deq(x).z.square().sum()  # noqa: E731
        got, want = (
            torch.autograd.grad(f(x), list(cell.parameters()))
            for f in (torch.compile(step, fullgraph=True, backend="aot_eager"), step)
        )
        torch.testing.assert_close(got, want)
        assert graphs() == 1

    @pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning")
    def test_evaluates_the_map_under_autocast_in_both_directions(self) -> None:
        deq = DEQ(Cell().float(), adjoint=Implicit(solver=Picard(), stopping=Stopping(rtol=1e-2)))
        x, parameters = torch.randn(3, 4), list(deq.parameters())

        def step(x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return deq(x).z.square().sum()

        got, want = (
            torch.autograd.grad(f(x), parameters) for f in (torch.compile(step, fullgraph=True, backend="aot_eager"), step)
        )
        assert [g.dtype for g in got] == [torch.float32] * len(got)
        torch.testing.assert_close(got, want, rtol=0.05, atol=0.05)

    @needs_compiler
    @pytest.mark.parametrize("options", [{}, {"cpp_wrapper": True}], ids=str)
    @pytest.mark.parametrize("solver", [Picard(), Broyden()], ids=repr)
    def test_runs_as_machine_code(self, solver: Solver[Any], options: dict[str, Any]) -> None:
        """With activations of its own in the same graph, which a backward pass may overwrite once it needs them no more."""
        z0, W, x = (t.float() for t in problem(8))
        W, weights = W.detach().requires_grad_(), torch.randn(8, 6)
        adjoint = Implicit(solver=solver, stopping=Stopping(rtol=1e-5))

        def loss(W: Tensor, x: Tensor) -> Tensor:
            z = fixed_point(
                tanh_map, z0, W, torch.sin(W.sum() + x), solver=solver, stopping=Stopping(rtol=1e-5), adjoint=adjoint
            ).z
            return (weights * torch.exp(torch.sin(z))).sum()

        got, want = (
            torch.autograd.grad(f(W, x), W)[0] for f in (torch.compile(loss, fullgraph=True, options=options), loss)
        )
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)

    def test_leaves_the_compiler_as_it_was(self) -> None:
        z0, W, x = problem()
        options: Any = config
        seen: list[bool] = []
        hoisted: list[bool] = []

        def backend(graph: Any, inputs: Any) -> Any:
            seen.append(options.donated_buffer)
            hoisted.append(isinstance(inductor.joint_custom_post_pass, LeanLoops))
            return graph

        def loss(W: Tensor) -> Tensor:
            first = fixed_point(tanh_map, z0, W, x, adjoint=ADJOINT).z
            return fixed_point(tanh_map, first, W, x, adjoint=ADJOINT).z.sum()

        torch.compile(loss, fullgraph=True, backend=backend)(W)
        assert (seen, hoisted) == ([False], [True])
        assert options.donated_buffer
        assert inductor.joint_custom_post_pass is None
        with options.patch(donated_buffer=False):
            torch.compile(lambda W: loss(W), fullgraph=True, backend=backend)(W)
            assert not options.donated_buffer
        torch.compile(lambda W: W.sin(), backend=backend)(W)
        assert seen == [False, False, True]
        assert hoisted == [True, True, False]

    def test_leaves_a_pass_of_the_user_in_its_place(self) -> None:
        z0, W, x = problem()
        seen: list[Any] = []

        def mine(graph: Any) -> None:
            seen.append(graph)

        with inductor.patch(joint_custom_post_pass=mine):
            torch.compile(
                lambda W: fixed_point(tanh_map, z0, W, x, adjoint=ADJOINT).z.sum(), fullgraph=True,
                backend=lambda graph, inputs: seen.append(inductor.joint_custom_post_pass) or graph,
            )(W)  # fmt: skip
        assert seen == [mine]

    @needs_compiler
    @pytest.mark.parametrize("gradient", [False, True])
    def test_repeats_in_a_loop_only_what_depends_on_its_state(self, gradient: bool) -> None:
        z0, W, x = problem(8)
        W, U = W.detach().requires_grad_(gradient), x.new_ones(x.shape[1], x.shape[1]) / 10
        solver, stopping = Picard(), Stopping(rtol=1e-5)

        def solve(W: Tensor) -> Solution:
            return fixed_point(
                lambda z, W, x: torch.tanh(torch.mm(z, W.t()) + torch.mm(x, U.t())), z0, W, x, solver=solver,
                stopping=stopping, adjoint=Implicit(solver=solver, stopping=stopping),
            )  # fmt: skip

        compiled, (want, stats) = torch.compile(lambda W: solve(W).z, fullgraph=True), solve(W)
        compiled(W)
        got, forward = products(lambda: compiled(W))
        torch.testing.assert_close(got, want)
        assert forward == 1 + stats.evaluations + gradient  # x Uᵀ, the solve, and f(z*) once more to be differentiated
        if gradient:
            (want,) = torch.autograd.grad(want.sum(), W)
            torch.autograd.grad(got.sum(), W)
            loss = compiled(W).sum()
            (got,), backward = products(lambda: torch.autograd.grad(loss, W))
            torch.testing.assert_close(got, want)
            assert backward == int(stats.backward[0].steps.max()) + 1  # u J of every step, and the gradient of W

    @pytest.mark.parametrize("transposed", [lambda W: W.T, lambda W: W.mT])
    def test_of_a_map_that_asks_for_an_attribute_of_its_weights(self, transposed: Callable[[Tensor], Tensor]) -> None:
        z0, W, x = problem()

        def loss(W: Tensor) -> Tensor:
            f = lambda z, W, x: torch.tanh(z @ transposed(W) + x)  # noqa: E731
            return fixed_point(f, z0, W, x, stopping=STOPPING, adjoint=ADJOINT).z.sum()

        (got,), (want,) = (
            torch.autograd.grad(f(W), W) for f in (torch.compile(loss, fullgraph=True, backend="aot_eager"), loss)
        )
        torch.testing.assert_close(got, want)

    def test_has_no_second_derivative_and_says_so(self) -> None:
        z0, W, x = problem()

        def loss(W: Tensor) -> Tensor:
            return fixed_point(tanh_map, z0, W, x, adjoint=ADJOINT).z.sum()

        (first,) = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(W), W, create_graph=True)
        with pytest.raises(RuntimeError, match="does not currently support double backward"):
            first.sum().backward()
