"""Mistakes that solvers of this kind are known for, each kept out by a test that names the behaviour."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from problems import normal, orthogonal, tanh_map
from steps import Unlimited
from torch import Tensor

import equilibria
from equilibria import (
    GMRES,
    Anderson,
    Broyden,
    Implicit,
    NewtonKrylov,
    Phantom,
    Picard,
    Status,
    Stopping,
    Unrolled,
    fixed_point,
)
from equilibria.stopping import linf, rms

SOLVERS: dict[str, Any] = {
    "picard": Picard(),
    "anderson": Anderson(),
    "broyden": Broyden(),
    "line search": Broyden(line_search=3),
    "newton": NewtonKrylov(),
}
each_solver = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
EXACT: dict[str, Any] = {
    "implicit": Implicit(stopping=Stopping(rtol=1e-12, atol=0, max_evals=100)),
    "implicit, picard": Implicit(solver=Picard(), stopping=Stopping(rtol=1e-12, atol=0, max_evals=500)),
    "implicit, anderson": Implicit(solver=Anderson(), stopping=Stopping(rtol=1e-12, atol=0, max_evals=200)),
    "implicit, broyden": Implicit(solver=Broyden(), stopping=Stopping(rtol=1e-12, atol=0, max_evals=200)),
    "unrolled": Unrolled(),
}
TIGHT = Stopping(rtol=1e-13, atol=0, max_evals=400)
W = 0.8 * orthogonal(5)
X = normal(0, 3, 5)
Z0 = torch.zeros(3, 5).double()

LONG: dict[str, Any] = {"rtol": 1e-6, "max_evals": 150}
OTHER_VALUES: dict[tuple[str, str], Any] = {
    ("Picard", "damping"): 0.5,
    ("Anderson", "history"): 2,
    ("Anderson", "damping"): 0.5,
    ("Anderson", "ridge"): 1e-2,
    ("Anderson", "type"): 1,
    ("Anderson", "restart"): 1.0,
    ("Broyden", "history"): 2,
    ("Broyden", "line_search"): 3,
    ("Broyden", "storage"): torch.bfloat16,
    ("Broyden", "divergence"): 2.0,
    ("NewtonKrylov", "max_krylov"): 1,
    ("NewtonKrylov", "forcing"): 1e-6,
    ("NewtonKrylov", "line_search"): 0,
    ("NewtonKrylov", "differences"): True,
    ("GMRES", "restart"): 2,
    ("GMRES", "keep"): 0,
    ("Stopping", "rtol"): 1e-2,
    ("Stopping", "atol"): 1e-2,
    ("Stopping", "max_evals"): 4,
    ("Stopping", "norm"): linf,
    ("Stopping", "check_every"): 1000,
    ("Stopping", "trace"): True,
    ("Implicit", "solver"): Picard(),
    ("Implicit", "stopping"): Stopping(max_evals=1),
    ("Phantom", "steps"): 3,
    ("Phantom", "damping"): 0.5,
    ("Neumann", "terms"): 2,
    ("Shine", "refine"): 0,
    ("Shine", "rtol"): 0.1,
    ("Shine", "solver"): Picard(),
    ("ReversiblePicard", "damping"): 0.3,
}


def has_defaults(kind: Any) -> bool:
    """Whether it can be made without saying more: a solver, an adjoint, Stopping."""
    fields = dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else []
    missing = dataclasses.MISSING
    return bool(fields) and all(field.default is not missing or field.default_factory is not missing for field in fields)


# What these change is no result, and tested with them: where a gradient is refused, how much memory is held.
ELSEWHERE = {("Reversible", "tolerance"), ("Unrolled", "checkpoint")}
OPTIONS = [
    (name, field.name)
    for name in equilibria.__all__
    if has_defaults(getattr(equilibria, name))
    for field in dataclasses.fields(getattr(equilibria, name))
    if (name, field.name) not in ELSEWHERE
]


def everything(**options: Any) -> list[Any]:
    """All that can be seen of a hard solve and its gradient: results, costs, and each z that f was given."""
    seen: list[Tensor] = []
    linear = isinstance(options.get("solver"), GMRES)

    def f(z: Tensor, W: Tensor, x: Tensor) -> Tensor:
        seen.append(z.detach().clone())
        return z @ W.T + x if linear else torch.tanh(z @ W.T + x) - 0.2 * z**2

    weight = (1.8 * orthogonal(5)).requires_grad_()
    z, stats = fixed_point(f, 3 + Z0, weight, 2 * X, **{"stopping": Stopping(**LONG), **options})
    (gradient,) = torch.autograd.grad(z.sum(), weight)
    shown = (stats.residual, stats.relative, stats.steps, stats.status, stats.evaluations, stats.trace is None)
    return [*seen, z.detach(), gradient, *map(torch.as_tensor, shown)]


def differ(one: list[Any], other: list[Any]) -> bool:
    return len(one) != len(other) or any(not torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(("name", "option"), OPTIONS, ids=map(".".join, OPTIONS))
def test_no_option_is_silently_ignored(name: str, option: str) -> None:
    """Each option of every solver, adjoint and of Stopping changes what is computed."""
    assert (name, option) in OTHER_VALUES, f"{name}({option}=) is new: give it another value above, and see it matter"
    kind: Any = getattr(equilibria, name)
    role = "stopping" if name == "Stopping" else "adjoint" if hasattr(kind, "solve") else "solver"
    defaults: dict[str, Any] = LONG if name == "Stopping" else {"restart": 2} if option == "keep" else {}
    before = everything(**{role: kind(**defaults)})
    assert not differ(before, everything(**{role: kind(**defaults)}))
    assert differ(before, everything(**{role: kind(**{**defaults, option: OTHER_VALUES[name, option]})}))


@pytest.mark.parametrize("damping", [0.3, 0.7, 1.5])
@pytest.mark.parametrize("kind", [Picard, Anderson])
@pytest.mark.parametrize("max_evals", [3, 8, 100])
def test_the_residual_is_not_that_of_the_damped_step(damping: float, kind: Any, max_evals: int) -> None:
    """‖z_new - z‖ would be smaller by the damping, and belong to another z."""
    z, stats = fixed_point(tanh_map, Z0, W, X, solver=kind(damping=damping), stopping=Stopping(max_evals=max_evals))
    assert torch.allclose(stats.residual, rms(tanh_map(z, W, X) - z), rtol=1e-9, atol=1e-15)


class TestSecondDerivatives:
    """Not silently wrong, as they are where the dependence of z* itself on the arguments is left out."""

    @pytest.mark.parametrize("adjoint", EXACT.values(), ids=EXACT)
    @pytest.mark.parametrize("solver", [Picard(), Anderson(history=3), Broyden()], ids=["picard", "anderson", "broyden"])
    def test_hessian_vector_product(self, adjoint: Any, solver: Any) -> None:
        direction = normal(7, 5, 5)

        def gradient(weight: Tensor, create_graph: bool) -> Tensor:
            z = fixed_point(tanh_map, Z0, weight, X, solver=solver, stopping=TIGHT, adjoint=adjoint).z
            return torch.autograd.grad(z.pow(3).sum(), weight, create_graph=create_graph)[0]

        weight = W.clone().requires_grad_()
        (product,) = torch.autograd.grad(gradient(weight, True), weight, direction)
        step = 1e-4
        there, back = ((W + s * direction).requires_grad_() for s in (step, -step))
        differences = (gradient(there, False) - gradient(back, False)) / (2 * step)
        assert (product - differences).norm() <= 1e-6 * differences.norm()
        assert differences.norm() > 1

    @pytest.mark.parametrize("adjoint", [Implicit(stopping=TIGHT), Unrolled()], ids=["implicit", "unrolled"])
    def test_third(self, adjoint: Any) -> None:
        """z = a z / 2 + a²  has z* = a² / (1 - a / 2)."""
        a = torch.full((1, 1), 0.5).double().requires_grad_()
        f = lambda z, a: 0.5 * a * z + a * a  # noqa: E731
        found = fixed_point(f, 0 * a.detach(), a, solver=Picard(), stopping=TIGHT, adjoint=adjoint).z
        for _ in range(3):
            (found,) = torch.autograd.grad(found.sum(), a, create_graph=True)
        # a² / (1 - a/2) = -2 a - 4 + 4 / (1 - a/2), of which the third derivative is 3 / (1 - a/2)⁴.
        assert found.item() == pytest.approx(3 / 0.75**4, rel=1e-8)


class TestNothingIsLeftBehind:
    """A hook on z*, or state kept by the solver, would change the gradient of a later loss."""

    @pytest.mark.parametrize("adjoint", [*EXACT.values(), Phantom(steps=2)], ids=[*EXACT, "phantom"])
    def test_a_second_loss_has_the_gradient_of_a_solve_of_its_own(self, adjoint: Any) -> None:
        def solve() -> tuple[Tensor, Tensor]:
            weight = W.clone().requires_grad_()
            return fixed_point(tanh_map, Z0, weight, X, adjoint=adjoint).z, weight

        losses = (Tensor.sum, lambda z: z.square().sum(), lambda z: z[1].exp().sum())
        alone = []
        for loss in losses:
            z, weight = solve()
            alone.append(torch.autograd.grad(loss(z), weight)[0])
        z, weight = solve()
        assert not z._backward_hooks
        for i in (0, 1, 0, 2, 1):
            assert torch.equal(torch.autograd.grad(losses[i](z), weight, retain_graph=True)[0], alone[i])
        assert not z._backward_hooks
        torch.stack([loss(z) for loss in losses]).sum().backward()
        assert weight.grad is not None
        assert torch.allclose(weight.grad, sum(alone, torch.zeros(())), rtol=1e-3, atol=1e-4)

    def test_a_hook_of_the_user_is_called_once_per_backward_pass(self) -> None:
        weight, seen = W.clone().requires_grad_(), []
        z = fixed_point(tanh_map, Z0, weight, X).z
        z.register_hook(lambda g: seen.append(g.clone()))
        z.sum().backward(retain_graph=True)
        z.sum().backward()
        assert len(seen) == 2
        assert all(torch.equal(g, torch.ones_like(z)) for g in seen)

    @each_solver
    def test_a_solver_serves_many_solves(self, solver: Any) -> None:
        """Also one inside another: nothing of a solve is kept in the solver."""
        first = fixed_point(tanh_map, Z0, W, X, solver=solver).z

        def outer(z: Tensor, W: Tensor, x: Tensor) -> Tensor:
            return 0.1 * z + 0.9 * fixed_point(tanh_map, torch.zeros_like(x), W, x, solver=solver).z

        assert torch.allclose(fixed_point(outer, Z0, W, X, solver=solver, stopping=TIGHT).z, first, rtol=1e-9, atol=1e-9)
        assert torch.equal(fixed_point(tanh_map, Z0, W, X, solver=solver).z, first)


@pytest.mark.parametrize("create_graph", [False, True])
def test_a_gradient_that_does_not_exist_is_told_of(create_graph: bool) -> None:
    """Where I - J is singular, the backward solve has no solution: what comes back is not passed for a gradient."""
    rates = torch.tensor([[0.5], [1.0], [0.9]]).double()
    x = torch.tensor([[1.0], [0.0], [2.0]]).double().requires_grad_()
    z, stats = fixed_point(lambda z, rates, x: rates * z + x, 1 + torch.zeros(3, 1).double(), rates, x)
    assert stats.converged.all()  # sample 1 is a fixed point, one of many
    (gradient,) = torch.autograd.grad(z.sum(), x, create_graph=create_graph)
    assert torch.allclose(gradient[[0, 2]], 1 / (1 - rates[[0, 2]]), rtol=1e-3)
    assert [stats.converged.tolist() for stats in stats.backward] == [[True, False, True]]
    assert float(stats.backward[0].relative[1]) == 1.0


class TestCost:
    @pytest.mark.parametrize("solver", [*SOLVERS.values(), GMRES()], ids=[*SOLVERS, "gmres"])
    def test_memory_of_a_solver_does_not_grow_with_the_steps(self, solver: Any) -> None:
        """A history as long as the budget, which grows with it, is what limited memory is to prevent."""
        f = Unlimited(lambda z: (z @ W.T + X) if isinstance(solver, GMRES) else torch.cos(3 * z) - 0.3 * z)
        state, sizes = solver.init(f, Z0), []
        for _ in range(160):
            state = solver.step(f, state)
            tensors = [value for value in vars(state).values() if isinstance(value, Tensor)]
            sizes.append(sum(tensor.untyped_storage().nbytes() for tensor in tensors))
        assert max(sizes[80:]) <= max(sizes[:80])

    @pytest.mark.parametrize("solver", [Anderson(), Broyden()], ids=["anderson", "broyden"])
    def test_an_age_never_overflows(self, solver: Any) -> None:
        f = Unlimited(lambda z: tanh_map(z, W, X))
        state = solver.init(f, Z0)
        for _ in range(solver.history + 3):
            state = solver.step(f, state)
        older = dataclasses.replace(state, age=state.age + solver.history * 2**70, **copies(state))
        assert torch.equal(solver.step(f, state).z, solver.step(f, older).z)

    @each_solver
    def test_a_singular_system_raises_nothing(self, solver: Any) -> None:
        """No differences, parallel ones, more of them than dimensions; beside a sample where all is well."""
        stopping = Stopping(rtol=1e-9, max_evals=60)

        def f(z: Tensor) -> Tensor:
            rows = (torch.full_like(z[0], 2.0), z[1] + 1, -z[2], z[3], 0.5 * z[4].mean().expand(2), torch.cos(z[5]))
            return torch.stack(rows)

        z, stats = fixed_point(f, torch.ones(6, 2).double(), solver=solver, stopping=stopping)
        assert z.isfinite().all()
        assert stats.status[[0, 3, 4, 5]].tolist() == [Status.CONVERGED] * 4
        assert stats.status[1] == Status.EXHAUSTED
        assert torch.allclose(z[5], torch.tensor(0.7390851332).double())


class TestRequiresGrad:
    @pytest.mark.parametrize("adjoint", [Implicit(), Phantom()], ids=["implicit", "phantom"])
    @pytest.mark.parametrize("name", ["cold", "solved already", "out of budget"])
    def test_z_requires_grad_where_an_argument_does_and_only_there(self, adjoint: Any, name: str) -> None:
        z0 = fixed_point(tanh_map, Z0, W, X, stopping=TIGHT).z if name == "solved already" else 0.1 + Z0
        options = {"adjoint": adjoint, "stopping": Stopping(max_evals=1 if name == "out of budget" else 50)}
        weight = W.clone().requires_grad_()
        z, stats = fixed_point(tanh_map, z0, weight, X, **options)
        assert z.requires_grad
        assert torch.autograd.grad(z.sum(), weight)[0].abs().max() > 0
        assert not stats.residual.requires_grad
        assert not fixed_point(tanh_map, z0, W, X, **options).z.requires_grad
        with torch.no_grad():
            assert not fixed_point(tanh_map, z0, weight, X, **options).z.requires_grad


def copies(state: Any) -> dict[str, Tensor]:
    """The tensors of a state, which a step may overwrite, in memory of their own."""
    return {name: value.clone() for name, value in vars(state).items() if isinstance(value, Tensor)}
