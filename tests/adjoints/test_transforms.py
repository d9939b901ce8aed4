"""torch.func over fixed points, against the same transforms of a closed form or of a solution written out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import normal, orthogonal, tanh_map
from torch import Tensor, nn

from equilibria import GMRES, Anderson, Broyden, Implicit, Phantom, Picard, Stats, Status, Stopping, fixed_point

# PyTorch's own, the first time that forward mode is used.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

TIGHT = Stopping(rtol=1e-13, atol=1e-14, max_evals=200)
IMPLICIT = Implicit(stopping=TIGHT)
X = normal(0, 2, 3)
W = 0.8 * orthogonal(3)


def solve(W: Tensor, x: Tensor) -> Tensor:
    return fixed_point(tanh_map, torch.zeros_like(x), W, x, stopping=TIGHT, adjoint=IMPLICIT).z


def total(W: Tensor) -> Tensor:
    return (solve(W, X) * torch.arange(6).reshape(2, 3)).sum()


def second_differences(f: Callable[[Tensor], Tensor], a: Tensor, step: float = 1e-3) -> Tensor:
    """∂²f by central differences, with an error of order step²."""
    moves = step * torch.eye(a.numel(), dtype=a.dtype).reshape(-1, *a.shape)
    rows = [
        [f(a + u + v) - f(a + u - v) - f(a - u + v) + f(a - u - v) for v in moves]
        for u in moves
    ]  # fmt: skip
    return torch.tensor(rows, dtype=a.dtype).reshape(*a.shape, *a.shape) / (4 * step**2)


@pytest.mark.parametrize(
    ("outer", "inner"),
    [
        (torch.func.jacrev, torch.func.jacrev),
        (torch.func.jacfwd, torch.func.jacrev),
        (torch.func.jacrev, torch.func.jacfwd),
    ],
    ids=["reverse-reverse", "forward-reverse", "reverse-forward"],
)
def test_second_derivatives(outer: Any, inner: Any) -> None:
    assert torch.allclose(outer(inner(total))(W), second_differences(total, W), rtol=1e-4, atol=1e-4)


def test_hessian() -> None:
    hessian = torch.func.hessian(total)(W)
    assert torch.allclose(hessian, second_differences(total, W), rtol=1e-4, atol=1e-4)
    matrix = hessian.reshape(9, 9)
    assert torch.allclose(matrix, matrix.T, rtol=1e-9, atol=1e-10)


def test_forward_modes_do_not_nest() -> None:
    """PyTorch loses the outer tangents of an autograd.Function there; an error must say so."""
    with pytest.raises(NotImplementedError, match=r"forward mode inside forward mode.*torch.func.hessian"):
        torch.func.jacfwd(torch.func.jacfwd(total))(W)


def matrices(W: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """∂z*/∂x (B, D, D) and ∂z*/∂W (B, D, D, D) by the implicit function theorem: with S = diag(1 - z*²), J = S W,
    (I - J)⁻¹ S and (I - J)⁻¹ S (e_i z*ᵀ)."""
    z = solve(W, x)
    S = torch.diag_embed(1 - z**2)
    of_x = torch.linalg.solve(torch.eye(3).double() - S @ W, S)
    return of_x, torch.einsum("bij,bk->bijk", of_x, z)


class TestFirstDerivatives:
    of_x, of_W = matrices(W, X)
    v_W, v_x, w = normal(1, 3, 3), normal(2, 2, 3), normal(3, 2, 3)

    def test_grad(self) -> None:
        found = torch.func.grad(lambda W, x: (self.w * solve(W, x)).sum(), argnums=(0, 1))(W, X)
        self.compare(found)

    def test_vjp(self) -> None:
        z, pullback = torch.func.vjp(solve, W, X)[:2]
        assert torch.equal(z, solve(W, X))
        self.compare(pullback(self.w))

    def compare(self, found: tuple[Tensor, Tensor]) -> None:
        assert torch.allclose(found[0], torch.einsum("bi,bijk->jk", self.w, self.of_W), rtol=1e-9, atol=1e-11)
        assert torch.allclose(found[1], torch.einsum("bi,bij->bj", self.w, self.of_x), rtol=1e-9, atol=1e-11)

    def test_jvp(self) -> None:
        z, pushed = torch.func.jvp(solve, (W, X), (self.v_W, self.v_x))[:2]
        expected = torch.einsum("bijk,jk->bi", self.of_W, self.v_W) + torch.einsum("bij,bj->bi", self.of_x, self.v_x)
        assert torch.equal(z, solve(W, X))
        assert torch.allclose(pushed, expected, rtol=1e-9, atol=1e-11)

    @pytest.mark.parametrize("jacobian", [torch.func.jacrev, torch.func.jacfwd], ids=["jacrev", "jacfwd"])
    def test_jacobians(self, jacobian: Any) -> None:
        of_W, of_x = jacobian(solve, argnums=(0, 1))(W, X)
        assert torch.allclose(of_W, self.of_W, rtol=1e-9, atol=1e-11)
        expected = torch.zeros(2, 3, 2, 3).double()
        expected[0, :, 0], expected[1, :, 1] = self.of_x
        assert torch.allclose(of_x, expected, rtol=1e-9, atol=1e-11)

    def test_jvp_under_vmap(self) -> None:
        """The columns of the Jacobian, in one solve."""
        directions = torch.eye(3).double().unsqueeze(1).expand(3, 2, 3)
        columns = torch.vmap(lambda v: torch.func.jvp(lambda x: solve(W, x), (X,), (v,))[1])(directions)
        assert torch.allclose(columns, self.of_x.permute(2, 0, 1), rtol=1e-9, atol=1e-11)

    def test_phantom_too(self) -> None:
        def phantom(W: Tensor) -> Tensor:
            z = fixed_point(tanh_map, torch.zeros_like(X), W, X, stopping=TIGHT, adjoint=Phantom()).z
            return (self.w * z).sum()

        z = solve(W, X)
        assert torch.allclose(torch.func.grad(phantom)(W), (self.w * (1 - z**2)).mT @ z, rtol=1e-10, atol=1e-12)
        tangent = torch.func.jvp(phantom, (W,), (self.v_W,))[1]
        assert torch.allclose(tangent, (self.w * (1 - z**2) * (z @ self.v_W.T)).sum(), rtol=1e-10)


SOLVERS: dict[str, Any] = {"picard": Picard(), "anderson": Anderson(), "broyden": Broyden()}


class TestVmap:
    """A batch of solves is one solve with a larger batch."""

    xs = normal(5, 4, 2, 3)
    scales = torch.tensor([0.1, 0.5, 0.8, 0.95]).double()

    @pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
    def test_equals_a_loop(self, solver: Any) -> None:
        """Each sample stops by itself: steps, status and residuals are those of the single solves."""
        stopping = Stopping(rtol=1e-6, max_evals=30, trace=True)

        def layer(x: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
            z, stats = fixed_point(tanh_map, torch.zeros(2, 3).double(), scale * W, x, solver=solver, stopping=stopping)
            assert isinstance(stats.evaluations, int)
            assert stats.trace is not None
            return z, stats.residual, stats.relative, stats.steps, stats.status, stats.trace

        z, residual, relative, steps, status, trace = torch.vmap(layer)(self.xs, self.scales)
        assert z.shape == (4, 2, 3)
        assert residual.shape == relative.shape == steps.shape == status.shape == (4, 2)
        assert trace.shape[::2] == (4, 2)
        assert steps.dtype == torch.int64
        assert status.dtype == torch.int8
        assert steps.unique().numel() > 2
        for i in range(4):
            single = layer(self.xs[i], self.scales[i])
            assert torch.allclose(z[i], single[0], rtol=1e-9, atol=1e-12)
            assert torch.allclose(residual[i], single[1], rtol=1e-5, atol=1e-13)
            assert torch.allclose(relative[i], single[2], rtol=1e-5, atol=1e-13)
            assert torch.equal(steps[i], single[3])
            assert torch.equal(status[i], single[4])
            assert torch.allclose(trace[i, : len(single[5])], single[5], rtol=1e-5, atol=1e-13)

    def test_statuses_differ_within_it(self) -> None:
        def status(rate: Tensor) -> Tensor:
            z0 = torch.ones(1, 2).double()
            return fixed_point(lambda z, rate: rate * z + 1, z0, rate, solver=Picard()).stats.status

        found = torch.vmap(status)(torch.tensor([0.5, 0.999]).double())
        assert found.tolist() == [[Status.CONVERGED], [Status.EXHAUSTED]]

    @pytest.mark.parametrize("in_dims", [(0, None), (None, 0), (0, 0), (1, 2), (-1, None)])
    def test_any_argument_may_carry_it(self, in_dims: tuple[int | None, int | None]) -> None:
        Ws = torch.stack([0.8 * orthogonal(3, seed) for seed in range(2)])
        xs = normal(6, 2, 2, 3)
        args = [stack[0] if dim is None else stack.movedim(0, dim) for stack, dim in zip((Ws, xs), in_dims, strict=True)]
        found = torch.vmap(solve, in_dims=in_dims)(*args)
        for i in range(2):
            single = [stack[0] if dim is None else stack[i] for stack, dim in zip((Ws, xs), in_dims, strict=True)]
            assert torch.allclose(found[i], solve(*single), rtol=1e-9, atol=1e-12)

    def test_within_another(self) -> None:
        found = torch.vmap(lambda s: torch.vmap(lambda x: solve(s * W, x))(self.xs))(self.scales[:2])
        assert found.shape == (2, 4, 2, 3)
        assert torch.allclose(found[1, 2], solve(self.scales[1] * W, self.xs[2]), rtol=1e-9, atol=1e-12)

    def test_over_z0_alone(self) -> None:
        found = torch.vmap(lambda z0: fixed_point(tanh_map, z0, W, X, stopping=TIGHT).z)(self.xs)
        assert torch.allclose(found, solve(W, X).expand(4, 2, 3), rtol=1e-9, atol=1e-11)

    def test_nested_state_and_module(self) -> None:
        torch.manual_seed(0)
        linear = nn.Linear(3, 3).double().requires_grad_(False)
        linear.weight.mul_(0.5)

        class Pair(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.linear = linear

            def forward(self, z: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
                return {"a": torch.tanh(self.linear(z["b"]) + x), "b": 0.5 * z["a"]}

        def layer(x: Tensor) -> dict[str, Tensor]:
            z0 = {"a": torch.zeros_like(x), "b": torch.zeros_like(x)}
            return fixed_point(Pair(), z0, x, stopping=TIGHT).z

        found, single = torch.vmap(layer)(self.xs), layer(self.xs[3])
        assert all(torch.allclose(found[name][3], single[name], rtol=1e-9, atol=1e-12) for name in "ab")

    def test_of_grad(self) -> None:
        """Gradients of every sample with respect to a weight they share."""

        def loss(W: Tensor, x: Tensor) -> Tensor:
            return solve(W, x[None]).square().sum()

        each = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(W, X)
        for i in range(2):
            assert torch.allclose(each[i], torch.func.grad(loss)(W, X[i]), rtol=1e-9, atol=1e-11)
        assert (each[0] - each[1]).abs().max() > 1e-3

    @pytest.mark.parametrize("solver", [GMRES(), Picard(), Anderson(), Broyden()], ids=lambda solver: type(solver).__name__)
    def test_grad_of_it(self, solver: Any) -> None:
        adjoint = Implicit(solver=solver, stopping=TIGHT)

        def loss(W: Tensor) -> Tensor:
            z = torch.vmap(
                lambda x: fixed_point(tanh_map, torch.zeros(1, 3).double(), W, x[None], stopping=TIGHT, adjoint=adjoint).z
            )(X)
            return z.square().sum()

        expected = torch.func.grad(lambda W: solve(W, X).square().sum())(W)
        assert torch.allclose(torch.func.grad(loss)(W), expected, rtol=1e-9, atol=1e-11)
        leaf = W.clone().requires_grad_()
        assert torch.allclose(torch.autograd.grad(loss(leaf), leaf)[0], expected, rtol=1e-9, atol=1e-11)

    def test_of_hessian(self) -> None:
        def loss(x: Tensor) -> Tensor:
            return solve(W, x[None]).square().sum()

        found = torch.vmap(torch.func.hessian(loss))(X)
        for i in range(2):
            assert torch.allclose(found[i], second_differences(loss, X[i]), rtol=1e-4, atol=1e-5)


def test_a_module_under_functional_call() -> None:
    """Parameters put into a module for one call have their own gradients, also of second order, after the call."""
    linear = nn.Linear(3, 3).double()

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = linear

        def forward(self, x: Tensor) -> Tensor:
            return fixed_point(self.map, torch.zeros_like(x), x, stopping=TIGHT, adjoint=IMPLICIT).z

        def map(self, z: Tensor, x: Tensor) -> Tensor:
            return torch.tanh(self.linear(z) + x)

    def loss(weight: Tensor) -> Tensor:
        values = {"linear.weight": weight, "linear.bias": torch.zeros(3).double()}
        return (torch.func.functional_call(Layer(), values, (X,)) * torch.arange(6).reshape(2, 3)).sum()

    weight = W.clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(weight), weight, create_graph=True)
    assert torch.allclose(first, torch.func.grad(total)(W), rtol=1e-9, atol=1e-11)
    (second,) = torch.autograd.grad(first.square().sum(), weight)
    expected = 2 * torch.einsum("ij,ijkl->kl", first.detach(), torch.func.hessian(total)(W))
    assert torch.allclose(second, expected, rtol=1e-8, atol=1e-9)
    assert torch.allclose(torch.func.hessian(loss)(W), torch.func.hessian(total)(W), rtol=1e-8, atol=1e-9)


def test_backward_statistics_of_a_transform_are_plain_numbers() -> None:
    """Where a transform hides a batch there are none: they would hold tensors that must not escape it."""
    seen: list[Stats] = []

    def loss(W: Tensor) -> Tensor:
        z, stats = fixed_point(tanh_map, torch.zeros_like(X), W, X, adjoint=IMPLICIT)
        seen.append(stats)
        return z.sum()

    torch.func.grad(loss)(W)
    assert len(seen[0].backward) == 1
    assert float(seen[0].backward[0].residual.max()) < 1e-12
    torch.vmap(torch.func.grad(loss))(W.expand(2, 3, 3))
    assert seen[1].backward == []
    leaf = W.clone().requires_grad_()
    loss(leaf).backward()
    assert len(seen[2].backward) == 1


class TestOlderVmap:
    """`is_grads_batched` and what is built on it hide a batch in a way that torch.func does not know."""

    w = normal(4, 5, 2, 3)

    @pytest.mark.parametrize("create_graph", [False, True])
    def test_batched_gradients_equal_a_loop(self, create_graph: bool) -> None:
        leaf, x = W.clone().requires_grad_(), X.clone().requires_grad_()
        z = solve(leaf, x)
        found = torch.autograd.grad(
            z, (leaf, x), self.w, is_grads_batched=True, retain_graph=True, create_graph=create_graph
        )
        for i, w in enumerate(self.w):
            for many, one in zip(found, torch.autograd.grad(z, (leaf, x), w, retain_graph=True), strict=True):
                assert torch.allclose(many[i], one, rtol=1e-10, atol=1e-12)
        assert found[0].requires_grad == create_graph

    def test_functional_jacobian_and_hessian(self) -> None:
        jacobian = torch.autograd.functional.jacobian(lambda W: solve(W, X), W, vectorize=True)
        assert torch.allclose(jacobian, torch.func.jacrev(solve)(W, X), rtol=1e-10, atol=1e-12)
        hessian = torch.autograd.functional.hessian(total, W, vectorize=True)
        assert torch.allclose(hessian, torch.func.hessian(total)(W), rtol=1e-9, atol=1e-10)

    def test_gradcheck(self) -> None:
        leaf, x = W.clone().requires_grad_(), X.clone().requires_grad_()
        assert torch.autograd.gradcheck(
            solve, (leaf, x), check_batched_grad=True, check_forward_ad=True, check_batched_forward_grad=True
        )
        assert torch.autograd.gradgradcheck(solve, (leaf, x), check_batched_grad=True)
