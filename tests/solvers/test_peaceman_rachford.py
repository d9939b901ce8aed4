"""Peaceman-Rachford splitting against the theory of monotone operators."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from problems import Counted, normal, residual_of
from steps import Unlimited, iterates
from torch import Tensor

from equilibria import Anderson, Implicit, PeacemanRachford, Picard, Stopping, Unrolled, fixed_point
from equilibria.solvers.peaceman_rachford import PeacemanRachfordState
from equilibria.stopping import rms

TIGHT = Stopping(rtol=1e-11, atol=1e-13, max_evals=2000)


def relu_map(z: Tensor, W: Tensor, c: Tensor) -> Tensor:
    return torch.relu(z @ W.mT + c)


def monotone_weight(seed: int, size: int, scale: float = 1.0, margin: float = 0.2) -> Tensor:
    A, B = scale * normal(seed, size, size), scale * normal(seed + 1, size, size)
    return (1 - margin) * torch.eye(size).double() - A.T @ A + B - B.T


def by_enumeration(W: Tensor, c: Tensor) -> list[Tensor]:
    """Every z (D,) = relu(W z + c), had by trying all sets of positive entries."""
    found, size = [], len(c)
    for signs in product([False, True], repeat=size):
        on = torch.tensor(signs)
        z = torch.zeros(size).double()
        z[on] = torch.linalg.solve(torch.eye(int(on.sum())).double() - W[on][:, on], c[on])
        if bool((z[on] > 0).all()) and bool(((W @ z + c)[~on] <= 0).all()):
            found.append(z)
    return found


def reflection(W: Tensor, alpha: float) -> Tensor:
    """(I - α (I - W)) (I + α (I - W))⁻¹"""
    identity = torch.eye(len(W)).double()
    return torch.linalg.solve(identity + alpha * (identity - W), identity - alpha * (identity - W), left=False)


def states_of(solver: PeacemanRachford, f: Callable[[Tensor], Tensor], z0: Tensor, steps: int) -> list[Any]:
    known = Unlimited(f)
    states: list[PeacemanRachfordState] = [solver.init(known, z0)]
    for _ in range(steps):
        states.append(solver.step(known, states[-1]))
    return states


@pytest.mark.parametrize("alpha", [0.03, 0.2, 1.0, 4.0])
@pytest.mark.parametrize("scale", [0.3, 1.0, 3.0])
def test_finds_the_only_solution_for_every_alpha(alpha: float, scale: float) -> None:
    """There is exactly one, for weights of any size, and every start leads to it."""
    W, c = monotone_weight(0, 6, scale), normal(2, 3, 6)
    solutions = [by_enumeration(W, row) for row in c]
    assert [len(found) for found in solutions] == [1, 1, 1]
    exact = torch.stack([found[0] for found in solutions])
    rate = float(torch.linalg.matrix_norm(reflection(W, alpha), ord=2))
    assert rate < 1
    stopping = Stopping(rtol=1e-10, atol=1e-12, max_evals=10 + int(60 / (1 - rate)))
    for start in (torch.zeros(3, 6).double(), 10 * normal(3, 3, 6)):
        solver = PeacemanRachford(weight=W, bias=c, alpha=alpha)
        z, stats = fixed_point(relu_map, start, W, c, solver=solver, stopping=stopping)
        assert stats.converged.all()
        assert torch.allclose(z, exact, rtol=1e-7, atol=1e-8)


def test_converges_where_picard_does_not() -> None:
    W, c = monotone_weight(4, 30, 2.0), normal(5, 4, 30)
    assert float(torch.linalg.matrix_norm(W, ord=2)) > 100
    solver = PeacemanRachford(weight=W, bias=c, alpha=0.05)
    assert fixed_point(relu_map, 0 * c, W, c, solver=solver, stopping=TIGHT).stats.converged.all()
    picard = fixed_point(relu_map, 0 * c, W, c, solver=Picard(), stopping=TIGHT, raise_nonfinite=False).stats
    assert not picard.converged.any()


@pytest.mark.parametrize("alpha", [0.1, 0.5, 2.0])
def test_contracts_at_the_rate_of_the_theory(alpha: float) -> None:
    """‖u - u*‖ falls at each step by ‖(I - α (I - W)) (I + α (I - W))⁻¹‖ at least, which m and ‖I - W‖ bound."""
    W, c = monotone_weight(6, 8, margin=0.3), normal(7, 3, 8)
    exact = torch.stack([by_enumeration(W, row)[0] for row in c])
    u = exact + alpha * (exact @ W.T + c - exact)
    states = states_of(PeacemanRachford(weight=W, bias=c, alpha=alpha), lambda z: relu_map(z, W, c), normal(8, 3, 8), 60)
    rate = float(torch.linalg.matrix_norm(reflection(W, alpha), ord=2))
    errors = [float((state.u - u).norm()) for state in states]
    for before, after in pairwise(errors):
        assert after <= rate * before + 1e-13
    assert errors[-1] < 1e-2 * errors[0]
    m, L = 0.3 * alpha, alpha * float(torch.linalg.matrix_norm(torch.eye(8).double() - W, ord=2))
    assert rate <= (1 - 4 * m / (1 + 2 * m + L**2)) ** 0.5 + 1e-12


def test_each_step_is_the_textbooks() -> None:
    W, c, z0, alpha = monotone_weight(9, 5), normal(10, 2, 5), normal(11, 2, 5), 0.7
    solver = PeacemanRachford(weight=W, bias=c, alpha=alpha)
    found = iterates(solver, lambda z: relu_map(z, W, c), z0, 6)
    identity = torch.eye(5).double()
    u = z0 + alpha * (z0 @ W.T + c - z0)
    for k in range(1, 7):
        u_half = 2 * torch.relu(u) - u
        z_half = torch.linalg.solve(identity + alpha * (identity - W), (u_half + alpha * c).T).T
        u = 2 * z_half - u_half
        assert torch.allclose(found[k], torch.relu(u), rtol=1e-10, atol=1e-12)


def test_stays_at_a_solution() -> None:
    W, c = monotone_weight(12, 6), normal(13, 1, 6)
    (exact,) = by_enumeration(W, c[0])
    solver = PeacemanRachford(weight=W, bias=c, alpha=0.4)
    for z in iterates(solver, lambda z: relu_map(z, W, c), exact.unsqueeze(0), 3):
        assert torch.allclose(z[0], exact, rtol=1e-12, atol=1e-13)


def test_a_step_is_one_evaluation_and_the_residual_is_that_of_f() -> None:
    W, c = monotone_weight(14, 6), normal(15, 4, 6)
    f = Counted(relu_map)
    z, stats = fixed_point(
        f, 0 * c, W, c, solver=PeacemanRachford(weight=W, bias=c), stopping=Stopping(max_evals=9, rtol=0)
    )
    assert f.calls == stats.evaluations == 9
    assert stats.steps.tolist() == [8] * 4
    assert torch.allclose(stats.residual, rms(residual_of(relu_map, z, W, c)), rtol=1e-12)


def test_averaged_it_solves_what_is_barely_monotone() -> None:
    """I - W skew, m = 0: Peaceman-Rachford circles around the solution for ever, Douglas-Rachford reaches it."""
    B = normal(16, 6, 6)
    W, c = torch.eye(6).double() - B + B.T, normal(17, 2, 6)

    def affine(z: Tensor, W: Tensor, c: Tensor) -> Tensor:
        return z @ W.T + c

    def solve(damping: float) -> Any:
        solver = PeacemanRachford(weight=W, bias=c, alpha=0.3, damping=damping, prox=lambda u: u)
        return fixed_point(affine, 0 * c, W, c, solver=solver, stopping=TIGHT)

    assert not solve(1.0).stats.converged.any()
    z, stats = solve(0.5)
    assert stats.converged.all()
    assert torch.allclose(z, torch.linalg.solve(B - B.T, c.T).T, rtol=1e-8)


def test_another_nonlinearity() -> None:
    """f(z) = soft threshold of W z + c at 0.3, the proximal map of 0.3 |z|; that of α φ has the threshold 0.3 α."""
    W, c, alpha = monotone_weight(18, 6), normal(19, 3, 6), 0.4

    def soft(z: Tensor, W: Tensor, c: Tensor) -> Tensor:
        return torch.nn.functional.softshrink(z @ W.T + c, 0.3)

    solver = PeacemanRachford(weight=W, bias=c, alpha=alpha, prox=lambda u: torch.nn.functional.softshrink(u, 0.3 * alpha))
    z, stats = fixed_point(soft, 0 * c, W, c, solver=solver, stopping=TIGHT)
    assert stats.converged.all()
    again = fixed_point(soft, z + 0.01, W, c, solver=Anderson(), stopping=TIGHT)
    assert again.stats.converged.all()
    assert torch.allclose(z, again.z, rtol=1e-8, atol=1e-10)


def test_smaller_batches_change_the_cost_alone() -> None:
    W, c = 0.3 * monotone_weight(20, 6), normal(21, 8, 6)
    c[1:] = -100 - c[1:].abs()  # z* = 0 there, found at once
    solved, rows = [], []
    for batch_dims in (None, (None, 0)):
        f = Counted(relu_map)
        solver = PeacemanRachford(weight=W, bias=c)
        solved.append(fixed_point(f, 0 * c, W, c, solver=solver, stopping=TIGHT, batch_dims=batch_dims))
        rows.append(f.rows)
    assert rows[1] < rows[0] / 2
    assert torch.allclose(solved[0].z, solved[1].z, rtol=1e-9, atol=1e-12)
    assert solved[1].stats.converged.all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_keeps_the_dtype_of_the_state(dtype: torch.dtype) -> None:
    W, c = monotone_weight(22, 6, 0.5).to(dtype), normal(23, 3, 6).to(dtype)
    z, stats = fixed_point(relu_map, 0 * c, W, c, solver=PeacemanRachford(weight=W, bias=c), stopping=Stopping(rtol=2e-2))
    assert z.dtype == dtype
    assert stats.converged.all()
    exact = torch.stack([by_enumeration(W.double(), row.double())[0] for row in c])
    assert torch.allclose(z.double(), exact, rtol=0.2, atol=0.05)


def test_implicit_and_unrolled_gradients_agree() -> None:
    """Also where autograd records the solver's own steps, through the weight and bias that it was given."""
    W, c = monotone_weight(24, 5).requires_grad_(), normal(25, 3, 5).requires_grad_()
    gradients = []
    for adjoint in (Implicit(stopping=TIGHT), Unrolled()):
        solver = PeacemanRachford(weight=W, bias=c, alpha=0.3)
        z = fixed_point(relu_map, torch.zeros(3, 5).double(), W, c, solver=solver, stopping=TIGHT, adjoint=adjoint).z
        gradients.append(torch.autograd.grad(z.square().sum(), (W, c)))
    for implicit, unrolled in zip(*gradients, strict=True):
        assert torch.allclose(implicit, unrolled, rtol=1e-7, atol=1e-9)


class TestMisuse:
    W, c = monotone_weight(26, 4), normal(27, 3, 4)

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"alpha": 0.0}, r"PeacemanRachford\(alpha=0.0\): alpha must be a finite number > 0"),
            ({"alpha": float("inf")}, r"PeacemanRachford\(alpha=inf\)"),
            ({"damping": 0.0}, r"PeacemanRachford\(damping=0.0\): damping must lie in \(0, 2\]"),
            ({"weight": W[:3]}, r"weight of shape \(3, 4\) and a bias of shape \(3, 4\); give weight \(D, D\)"),
            ({"bias": c[:, :2]}, r"weight of shape \(4, 4\) and a bias of shape \(3, 2\)"),
            ({"bias": c[0]}, r"bias of shape \(4,\); give weight \(D, D\) and bias \(B, D\)"),
        ],
    )
    def test_options_out_of_range(self, options: dict[str, Any], words: str) -> None:
        with pytest.raises(ValueError, match=words):
            PeacemanRachford(**{"weight": self.W, "bias": self.c, **options})

    def test_a_state_of_another_batch(self) -> None:
        solver = PeacemanRachford(weight=self.W, bias=self.c)
        with pytest.raises(ValueError, match=r"bias of shape \(3, 4\) for a state of shape \(2, 4\).*give a row for each"):
            fixed_point(relu_map, torch.zeros(2, 4).double(), self.W, self.c[:2], solver=solver)

    def test_vmap(self) -> None:
        def solve(c: Tensor) -> Tensor:
            return fixed_point(relu_map, 0 * c, self.W, c, solver=PeacemanRachford(weight=self.W, bias=c)).z

        with pytest.raises(ValueError, match=r"for a state of shape \(6, 4\).*torch.vmap.*pass the larger batch yourself"):
            torch.vmap(solve)(torch.stack([self.c, 2 * self.c]))

    def test_a_weight_that_is_not_monotone(self) -> None:
        W = 2 * torch.eye(4).double()
        with pytest.raises(ValueError, match=r"I \+ alpha \(I - W\) is singular, so I - W is not monotone"):
            fixed_point(relu_map, 0 * self.c, W, self.c, solver=PeacemanRachford(weight=W, bias=self.c))
