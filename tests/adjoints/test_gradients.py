"""Every way to differentiate, against finite differences, against each other and against automatic differentiation.

`gradcheck` compares with finite differences in float64, reverse mode and forward mode; `gradgradcheck` does the same for
second derivatives, reverse over reverse and forward over reverse.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import PROBLEMS, affine_map, flat, nested_map, normal, orthogonal, tanh_map
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map

from equilibria import DEQ, GMRES, Anderson, Broyden, Implicit, Phantom, Picard, Stopping, Unrolled, fixed_point

# PyTorch's own, the first time that forward mode is used.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

TIGHT = Stopping(rtol=1e-13, atol=1e-15, max_evals=1000)
IMPLICIT = Implicit(stopping=TIGHT)
Layer = Callable[..., Any]


class Cell(nn.Module):
    """tanh(W z + b + U x): for use as f, by itself, through a bound method, and as the block of a DEQ."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(3, 3).double(), nn.Linear(2, 3).double()
        with torch.no_grad():
            self.inner.weight.copy_(0.7 * orthogonal(3))
            self.outer.weight.copy_(normal(0, 3, 2))
            self.inner.bias.copy_(normal(1, 3))
            self.outer.bias.zero_()

    def prepare(self, x: Tensor) -> tuple[Tensor]:
        return (self.outer(x),)

    def initial(self, x: Tensor) -> Tensor:
        return x.new_zeros(len(x), 3)

    def forward(self, z: Tensor, injected: Tensor) -> Tensor:
        return torch.tanh(self.inner(z) + injected)

    def with_input(self, z: Tensor, x: Tensor) -> Tensor:
        return self(z, self.outer(x))


class Solve(nn.Module):
    """z* of a cell, as a module, so that other parameters can be put in its place."""

    def __init__(self, cell: Cell, method: str) -> None:
        super().__init__()
        self.cell, self.method = cell, method

    def forward(self, x: Tensor) -> Tensor:
        f = self.cell if self.method == "forward" else getattr(self.cell, self.method)
        x = torch.cat((x, x[:, :1]), dim=1) if self.method == "forward" else x
        return fixed_point(f, x.new_zeros(len(x), 3), x, stopping=TIGHT, adjoint=IMPLICIT).z


def of_parameters(module: nn.Module, x: Tensor, take: Callable[[Any], Tensor] = lambda z: z) -> tuple[Layer, list[Tensor]]:
    """A module as a function of x and its parameters."""
    names = [name for name, _ in module.named_parameters()]
    values = [parameter.detach().clone() for parameter in module.parameters()]

    def layer(x: Tensor, *values: Tensor) -> Tensor:
        return take(functional_call(module, dict(zip(names, values, strict=True)), (x,)))

    return layer, [x, *values]


def function_form() -> tuple[Layer, list[Tensor]]:
    W, x = 0.7 * orthogonal(3), normal(0, 2, 3)
    return lambda W, x: fixed_point(tanh_map, torch.zeros_like(x), W, x, stopping=TIGHT, adjoint=IMPLICIT).z, [W, x]


def nested_form() -> tuple[Layer, list[Tensor]]:
    problem = PROBLEMS["nested"](2, (2,), torch.float64)

    def layer(W: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        z = fixed_point(nested_map, problem.z0, W, x, stopping=TIGHT, adjoint=IMPLICIT).z
        return z["wide"], z["rest"][0]

    return layer, list(problem.args)


FORMS: dict[str, Callable[[], tuple[Layer, list[Tensor]]]] = {
    "function": function_form,
    "nested state": nested_form,
    "module": lambda: of_parameters(Solve(Cell(), "forward"), normal(2, 2, 2)),
    "bound method": lambda: of_parameters(Solve(Cell(), "with_input"), normal(2, 2, 2)),
    "DEQ": lambda: of_parameters(DEQ(Cell(), stopping=TIGHT, adjoint=IMPLICIT), normal(2, 2, 2), lambda out: out.z),
}


@pytest.mark.parametrize("form", FORMS)
class TestEveryForm:
    def test_gradcheck(self, form: str) -> None:
        layer, inputs = FORMS[form]()
        inputs = tuple(value.requires_grad_() for value in inputs)
        assert torch.autograd.gradcheck(layer, inputs, check_forward_ad=True)

    def test_gradgradcheck(self, form: str) -> None:
        layer, inputs = FORMS[form]()
        inputs = tuple(value.requires_grad_() for value in inputs)
        assert torch.autograd.gradgradcheck(layer, inputs, check_fwd_over_rev=True)


BACKWARD: dict[str, Any] = {
    "gmres": GMRES(),
    "gmres restarted": GMRES(restart=2),
    "picard": Picard(),
    "picard damped": Picard(damping=0.5),
    "anderson": Anderson(),
    "anderson damped": Anderson(history=3, damping=0.7),
    "broyden": Broyden(),
    "broyden line search": Broyden(history=4, line_search=3),
}


@pytest.mark.parametrize("solver", BACKWARD.values(), ids=BACKWARD)
def test_every_backward_solver(solver: Any) -> None:
    adjoint = Implicit(solver=solver, stopping=TIGHT)

    def layer(W: Tensor, x: Tensor) -> Tensor:
        return fixed_point(tanh_map, torch.zeros_like(x), W, x, stopping=TIGHT, adjoint=adjoint).z

    inputs = ((0.6 * orthogonal(3)).requires_grad_(), normal(0, 2, 3).requires_grad_())
    assert torch.autograd.gradcheck(layer, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(layer, inputs)


def central_differences(f: Callable[..., Tensor], args: tuple[Tensor, ...], step: float = 1e-4) -> list[Tensor]:
    """Of a scalar f, with an error of order step⁴ (four points)."""
    found = []
    for i, arg in enumerate(args):
        gradient = torch.zeros(arg.shape, dtype=arg.dtype)
        for j in range(arg.numel()):
            move = step * nn.functional.one_hot(torch.tensor(j), arg.numel()).to(arg.dtype).reshape(arg.shape)
            values = [f(*args[:i], arg + k * move, *args[i + 1 :]) for k in (1, -1, 2, -2)]
            gradient.view(-1)[j] = (8 * (values[0] - values[1]) - (values[2] - values[3])) / (12 * step)
        found.append(gradient)
    return found


@pytest.mark.parametrize("name", [name for name in PROBLEMS if name != "cosine"])  # which has no args
def test_implicit_unrolled_and_finite_differences_agree(name: str) -> None:
    problem = PROBLEMS[name](2, (4,), torch.float64)
    weights = normal(11, *flat(problem.z0).shape)

    def loss(*args: Tensor, adjoint: Any) -> Tensor:
        # Of a map with a spectral radius of 0.95 in both directions, plain steps take long; damped ones take longer.
        unrolled = Picard(damping=0.4 if name == "tanh_expansion" else 1.0)
        solver = unrolled if isinstance(adjoint, Unrolled) else Anderson()
        z, stats = fixed_point(problem.f, problem.z0, *args, solver=solver, stopping=TIGHT, adjoint=adjoint)
        assert stats.converged.all()
        return (weights * torch.sin(flat(z) + 1)).sum()

    args = tuple(arg.clone().requires_grad_() for arg in problem.args)
    implicit = torch.autograd.grad(loss(*args, adjoint=IMPLICIT), args)
    unrolled = torch.autograd.grad(loss(*args, adjoint=Unrolled()), args)
    with torch.no_grad():
        numeric = central_differences(lambda *args: loss(*args, adjoint=IMPLICIT), problem.args)
    for mine, recorded, measured in zip(implicit, unrolled, numeric, strict=True):
        size = max(float(measured.norm()), 1.0)
        assert (mine - recorded).norm() <= 1e-6 * size
        assert (mine - measured).norm() <= 1e-6 * size
        assert (recorded - measured).norm() <= 1e-6 * size


def test_unrolled_through_each_solver_equals_implicit() -> None:
    W, x = (0.6 * orthogonal(4)).requires_grad_(), normal(0, 3, 4).requires_grad_()

    def gradients(solver: Any, adjoint: Any) -> Tensor:
        z = fixed_point(tanh_map, torch.zeros(3, 4).double(), W, x, solver=solver, stopping=TIGHT, adjoint=adjoint).z
        return torch.cat([g.flatten() for g in torch.autograd.grad((z**2).sum(), (W, x))])

    exact = gradients(Anderson(), IMPLICIT)
    # The derivative of a step lags behind the step itself; with tolerances this tight it has arrived too.
    for solver in (Picard(), Anderson(), Broyden()):
        assert torch.allclose(gradients(solver, Unrolled()), exact, rtol=1e-6, atol=1e-6), solver


def test_the_closed_form_of_an_affine_map() -> None:
    """z* = (I - A)⁻¹ b: ∂(c·z*)/∂b = (I - A)⁻ᵀ c = u and ∂/∂A = Σ u z*ᵀ."""
    A, b, c = (1.3 * orthogonal(5)).requires_grad_(), normal(0, 3, 5).requires_grad_(), normal(1, 3, 5)
    z = fixed_point(affine_map, torch.zeros(3, 5).double(), A, b, stopping=TIGHT, adjoint=IMPLICIT).z
    of_A, of_b = torch.autograd.grad((c * z).sum(), (A, b))
    u = torch.linalg.solve((torch.eye(5).double() - A).mT, c.mT).mT
    assert torch.allclose(of_b, u, rtol=1e-10, atol=1e-10)
    assert torch.allclose(of_A, u.mT @ z, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("form", FORMS)
def test_forward_and_reverse_are_adjoint(form: str) -> None:
    """<J v, w> = <v, Jᵀ w>"""
    layer, inputs = FORMS[form]()
    v = [normal(20 + i, *value.shape) for i, value in enumerate(inputs)]
    output, pushed = torch.func.jvp(layer, tuple(inputs), tuple(v))[:2]
    w = tree_map(lambda part: normal(30, *part.shape), output)
    pulled = torch.func.vjp(layer, *inputs)[1](w)
    left = (flat(pushed) * flat(w)).sum()
    right = torch.stack([(a * b).sum() for a, b in zip(v, pulled, strict=True)]).sum()
    assert abs(float(left)) > 1e-2
    assert torch.allclose(left, right, rtol=1e-10, atol=0)


class TestPhantom:
    W, x, c = 0.7 * orthogonal(4), normal(0, 3, 4), normal(1, 3, 4)

    def solve(self, adjoint: Any) -> tuple[Tensor, list[Tensor]]:
        args = [self.W.clone().requires_grad_(), self.x.clone().requires_grad_()]
        z = fixed_point(tanh_map, torch.zeros(3, 4).double(), *args, stopping=TIGHT, adjoint=adjoint).z
        return z.detach(), list(torch.autograd.grad((self.c * z + z**2).sum(), args))

    @pytest.mark.parametrize("damping", [1.0, 0.5, 1.3])
    @pytest.mark.parametrize("steps", [1, 2, 5])
    def test_equals_the_recursion_by_hand(self, steps: int, damping: float) -> None:
        z_star, found = self.solve(Phantom(steps=steps, damping=damping))
        args = [self.W.clone().requires_grad_(), self.x.clone().requires_grad_()]
        z = z_star
        for _ in range(steps):
            z = (1 - damping) * z + damping * tanh_map(z, *args)
        expected = torch.autograd.grad(z, args, self.c + 2 * z_star)
        for mine, theirs in zip(found, expected, strict=True):
            assert torch.allclose(mine, theirs, rtol=1e-12, atol=1e-13)

    def test_one_step_is_the_jacobian_free_gradient(self) -> None:
        """u = g: for tanh(W z + x), ∂/∂x = g (1 - z*²), ∂/∂W = Σ of that times z*ᵀ."""
        z, (of_W, of_x) = self.solve(Phantom())
        expected = (self.c + 2 * z) * (1 - z**2)
        assert torch.allclose(of_x, expected, rtol=1e-11)
        assert torch.allclose(of_W, expected.mT @ z, rtol=1e-11, atol=1e-12)

    @pytest.mark.parametrize("damping", [1.0, 0.5])
    def test_tends_to_the_implicit_gradient(self, damping: float) -> None:
        exact = self.solve(IMPLICIT)[1]
        errors = [
            max(float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True))
            for found in (self.solve(Phantom(steps=k, damping=damping))[1] for k in (1, 4, 16, 64, 128))
        ]
        assert errors == sorted(errors, reverse=True)
        assert errors[0] > 0.1
        # ‖J‖ <= 0.7, so a damped step contracts by 1 - 0.3 · damping at least.
        assert errors[-1] < 1e-6
        assert errors[3] <= errors[2]

    def test_gradcheck_of_its_own_gradient(self) -> None:
        """The gradient it gives is that of the recorded steps, so it can be differentiated further where z* is constant."""
        args = (self.W.clone().requires_grad_(), self.x.clone().requires_grad_())
        z = fixed_point(tanh_map, torch.zeros(3, 4).double(), *args, stopping=TIGHT, adjoint=Phantom(steps=2)).z
        first = torch.autograd.grad(z.sum(), args, create_graph=True)
        z_star = z.detach()
        by_hand = tanh_map(tanh_map(z_star, *args), *args)
        expected = torch.autograd.grad(by_hand.sum(), args, create_graph=True)
        mine = torch.autograd.grad(first[0].square().sum(), args)
        theirs = torch.autograd.grad(expected[0].square().sum(), args)
        assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-12) for a, b in zip(mine, theirs, strict=True))

    def test_its_steps_count_as_evaluations(self) -> None:
        one, many = (
            fixed_point(
                tanh_map, torch.zeros(3, 4).double(), self.W, self.x.clone().requires_grad_(), adjoint=Phantom(steps=k)
            )
            for k in (1, 7)
        )
        assert many.stats.evaluations == one.stats.evaluations + 6

    @pytest.mark.parametrize(
        ("options", "words"),
        [({"steps": 0}, "steps=0"), ({"steps": 1.5}, "steps=1.5"), ({"damping": 0.0}, "damping=0.0"),
         ({"damping": 2.5}, "damping=2.5")],
    )  # fmt: skip
    def test_refuses_what_makes_no_step(self, options: dict[str, Any], words: str) -> None:
        with pytest.raises(ValueError, match=words):
            Phantom(**options)
