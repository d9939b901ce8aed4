"""torch.compile: a compiled map inside an eager solve."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from equilibria import (
    DEQ,
    Implicit,
    Phantom,
    RandomMapError,
    Stopping,
    UndeclaredTensorError,
    Unrolled,
    fixed_point,
)

# What the compiler itself warns of, also for functions that know nothing of this library.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
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

    @pytest.mark.parametrize("adjoint", [Phantom(steps=2), Unrolled()])
    def test_other_adjoints_record_it(self, adjoint: Any) -> None:
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
