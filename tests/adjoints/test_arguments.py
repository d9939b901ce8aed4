"""Functions and arguments of every kind that PyTorch has: sparse, complex, compiled, checkpointed, given twice."""

from __future__ import annotations

import gc
import weakref
from collections import UserDict
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from problems import normal, orthogonal, tanh_map
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from equilibria import (
    Implicit,
    Neumann,
    NewtonKrylov,
    Phantom,
    Picard,
    Stopping,
    UndeclaredTensorError,
    Unrolled,
    fixed_point,
)

TIGHT = Stopping(rtol=1e-12, atol=0, max_evals=200)
ADJOINTS: dict[str, Any] = {
    "implicit": Implicit(stopping=TIGHT),
    "phantom": Phantom(steps=2),
    "unrolled": Unrolled(),
    "neumann": Neumann(),
    "unrolled in segments": Unrolled(checkpoint=True),
}
each_adjoint = pytest.mark.parametrize("adjoint", ADJOINTS.values(), ids=ADJOINTS)
W = 0.7 * orthogonal(4)
X = normal(0, 3, 4)
Z0 = torch.zeros(3, 4).double()


def solve(f: Any, *args: Any, adjoint: Any, **options: Any) -> Tensor:
    return fixed_point(f, Z0, *args, adjoint=adjoint, **{"stopping": TIGHT, "solver": Picard(), **options}).z


def same(found: Tensor, of: Tensor, expected: Tensor, by: Tensor) -> None:
    """Equal in value, and in the gradient of `found` in `of` and of `expected` in `by`."""
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-11)
    one, other = (
        torch.autograd.grad(z.square().sum(), arg, retain_graph=True)[0] for z, arg in ((found, of), (expected, by))
    )
    one = one.to_dense() if one.layout != torch.strided else one
    assert torch.allclose(one, other * (one != 0), rtol=1e-9, atol=1e-11)
    assert one.abs().max() > 0.1


class TestArgs:
    @pytest.mark.filterwarnings("ignore:Sparse (CSR|invariant):UserWarning")
    @each_adjoint
    @pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr], ids=["coo", "csr"])
    def test_sparse(self, adjoint: Any, layout: torch.layout) -> None:
        """The adjacency of a graph, say: its gradient stays where its entries are."""
        full = torch.where(W.abs() > 0.3, W, 0.0).requires_grad_()
        sparse = full.detach().to_sparse(layout=layout).requires_grad_()
        found = solve(lambda z, S, x: torch.tanh((S @ z.mT).mT + x), sparse, X, adjoint=adjoint)
        same(found, sparse, solve(tanh_map, full, X, adjoint=adjoint), full)

    @pytest.mark.parametrize("name", ADJOINTS)
    def test_complex(self, name: str, request: pytest.FixtureRequest) -> None:
        """A state is real, but what f is given need not be."""
        x = X.clone().requires_grad_()
        c = torch.complex(X, 2 * X).requires_grad_()
        found = solve(lambda z, c: torch.tanh(z @ W.T + (c * (2 - 0.5j)).real), c, adjoint=ADJOINTS[name])
        expected = solve(lambda z, x: torch.tanh(z @ W.T + 3 * x), x, adjoint=ADJOINTS[name])
        assert torch.allclose(found, expected, rtol=1e-9, atol=1e-11)
        of_c, of_x = (torch.autograd.grad(z.square().sum(), arg)[0] for z, arg in ((found, c), (expected, x)))
        assert torch.allclose(of_c, of_x / 3 * (2 + 0.5j), rtol=1e-9, atol=1e-11)

    @each_adjoint
    def test_passed_and_owned_as_well(self, adjoint: Any) -> None:
        class Twice(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight = nn.Parameter(W.clone())

            def forward(self, z: Tensor, weight: Tensor, x: Tensor) -> Tensor:
                return tanh_map(z, 0.25 * self.weight + 0.75 * weight, x)

        module, weight = Twice(), W.clone().requires_grad_()
        found = solve(module, module.weight, X, adjoint=adjoint)
        same(found, module.weight, solve(tanh_map, weight, X, adjoint=adjoint), weight)

    def test_held_by_what_is_no_structure(self) -> None:
        """A tensor inside an object that cannot be taken apart would lose its gradient: it is found in use."""

        @dataclass
        class Held:
            weight: Tensor

        weight = W.clone().requires_grad_()
        for f, arg in (
            (lambda z, held, x: tanh_map(z, held.weight, x), Held(weight)),
            (lambda z, held, x: tanh_map(z, held["weight"], x), UserDict(weight=weight)),
        ):
            with pytest.raises(UndeclaredTensorError, match=r"of shape \(4, 4\), which requires grad but is not passed"):
                solve(f, arg, X, adjoint=Implicit())


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4).double()
        with torch.no_grad():
            self.inner.weight.copy_(W)
            self.inner.bias.zero_()

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(z) + x)


class TestFunctions:
    @pytest.mark.filterwarnings("ignore")  # the compiler's own
    @each_adjoint
    @pytest.mark.parametrize("solver", [Picard(), NewtonKrylov(line_search=0)], ids=["picard", "newton"])
    def test_compiled(self, adjoint: Any, solver: Any, request: pytest.FixtureRequest) -> None:
        plain = Block()
        compiled: Any = torch.compile(plain, backend="eager")
        found, expected = (solve(f, X, adjoint=adjoint, solver=solver) for f in (compiled, plain))
        same(found, plain.inner.weight, expected, plain.inner.weight)

    @each_adjoint
    def test_checkpointed_inside(self, adjoint: Any) -> None:
        def f(z: Tensor, W: Tensor, x: Tensor) -> Tensor:
            out = checkpoint(tanh_map, z, W, x, use_reentrant=False)
            assert isinstance(out, Tensor)
            return out

        weight, other = W.clone().requires_grad_(), W.clone().requires_grad_()
        same(solve(f, weight, X, adjoint=adjoint), weight, solve(tanh_map, other, X, adjoint=adjoint), other)

    @each_adjoint
    def test_with_a_backward_of_its_own(self, adjoint: Any) -> None:
        """An autograd function in the older form, which torch.func cannot see through."""

        class Tanh(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, v: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
                out = torch.tanh(v)
                ctx.save_for_backward(out)
                return out

            @staticmethod
            def backward(ctx: Any, g: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
                return g * (1 - ctx.saved_tensors[0].square())

        weight, other = W.clone().requires_grad_(), W.clone().requires_grad_()
        found = solve(lambda z, W, x: Tanh.apply(z @ W.T + x), weight, X, adjoint=adjoint)
        same(found, weight, solve(tanh_map, other, X, adjoint=adjoint), other)


@each_adjoint
def test_writing_into_the_solution_is_right_or_refused(adjoint: Any) -> None:
    weight, other = W.clone().requires_grad_(), W.clone().requires_grad_()
    written = solve(tanh_map, weight, X, adjoint=adjoint).mul_(2)
    (expected,) = torch.autograd.grad((2 * solve(tanh_map, other, X, adjoint=adjoint)).square().sum(), other)
    if isinstance(adjoint, (Implicit, Neumann)):  # which holds it for the backward pass
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            written.sum().backward()
    else:
        (found,) = torch.autograd.grad(written.square().sum(), weight)
        assert torch.allclose(found, expected, rtol=1e-10)


@each_adjoint
def test_memory_is_free_without_the_garbage_collector(adjoint: Any) -> None:
    """No cycle of references holds a solution, which on a GPU is memory that nothing counts."""
    weight = W.clone().requires_grad_()
    gc.disable()
    try:
        solution = fixed_point(tanh_map, Z0, weight, X, adjoint=adjoint)
        solution.z.square().sum().backward()
        held = [weakref.ref(solution.z), weakref.ref(solution.stats.residual)]
        del solution
        assert [reference() for reference in held] == [None, None]
    finally:
        gc.enable()
