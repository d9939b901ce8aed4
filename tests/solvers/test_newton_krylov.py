"""Newton-Krylov against its definition."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from problems import Counted, affine_map, cosine_map, jacobian, normal, orthogonal, solve_exactly, tanh_map
from steps import Unlimited, iterates
from test_gmres import best_in_krylov
from torch import Tensor

from equilibria import Implicit, NewtonKrylov, Picard, Status, Stopping, Unrolled, fixed_point
from equilibria.solvers.newton_krylov import NewtonKrylovState
from equilibria.stopping import l2

W, X = 0.9 * orthogonal(6), normal(1, 4, 6)
EXACT = NewtonKrylov(forcing=0.0, max_krylov=20, line_search=0)
SLOPE = 4 / 27**0.5  # the most of |tanh''|


class Budget(Unlimited):
    """Raises when more is spent than there is; counts f and products alike."""

    def __init__(self, f: Callable[[Tensor], Tensor], budget: int) -> None:
        super().__init__(f)
        self.remaining = budget

    def spend(self) -> None:
        assert self.remaining > 0, "the solver spends more evaluations than it has"
        self.remaining -= 1

    def __call__(self, z: Tensor, /) -> Tensor:
        self.spend()
        return super().__call__(z)

    def linearize(self, z: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        self.spend()
        fz, product = super().linearize(z)

        def counted(v: Tensor) -> Tensor:
            self.spend()
            return product(v)

        return fz, counted


def tanh_of(z: Tensor) -> Tensor:
    return tanh_map(z, W, X[: len(z)])


def system(f: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """(B, D, D): I - J at z."""
    return torch.eye(z.shape[1]).double() - jacobian(f, z)


def states_of(solver: NewtonKrylov, f: Callable[[Tensor], Tensor], z0: Tensor, steps: int) -> list[NewtonKrylovState]:
    known = Unlimited(f)
    states = [solver.init(known, z0)]
    for _ in range(steps):
        states.append(solver.step(known, states[-1]))
    return states


class TestExactNewton:
    """With η = 0 and room for the whole space it is Newton's method."""

    def test_each_step_is_newtons(self) -> None:
        z = normal(2, 4, 6)
        for found in iterates(EXACT, tanh_of, z, 4):
            assert torch.allclose(found, z, rtol=1e-9, atol=1e-11)
            z = found + torch.linalg.solve(system(tanh_of, found), tanh_of(found) - found)

    def test_an_affine_map_takes_one_step(self) -> None:
        A, b = 1.3 * orthogonal(7), normal(3, 3, 7)
        f = Budget(lambda z: affine_map(z, A, b), 10)
        state = EXACT.step(f, EXACT.init(f, normal(4, 3, 7)))
        assert torch.allclose(state.z, torch.linalg.solve(torch.eye(7).double() - A, b.mT).mT, rtol=1e-10)
        assert f.remaining == 0  # f(z0), f and its Jacobian there, seven products, f at the solution

    @pytest.mark.parametrize(
        ("f", "curvature", "z0"),
        [(cosine_map, 1.0, normal(5, 4, 6).abs()), (tanh_of, SLOPE * 0.9**2, 0.3 * normal(6, 4, 6))],
        ids=["cosine", "tanh"],
    )
    def test_residuals_fall_quadratically(self, f: Any, curvature: float, z0: Tensor) -> None:
        """‖g(z + s)‖ <= ½ c ‖s‖² <= ½ c ‖(I - J)⁻¹‖² ‖g(z)‖², where c bounds the second derivative."""
        found = iterates(EXACT, f, z0, 6)
        residuals = [l2(f(z) - z) for z in found]
        for z, before, after in zip(found, residuals, residuals[1:], strict=False):
            inverse = torch.linalg.matrix_norm(torch.linalg.inv(system(f, z)), ord=2)
            assert (after <= 0.5 * curvature * (inverse * before) ** 2 + 1e-15).all()
        assert max(float(r.max()) for r in residuals[5:]) < 1e-14


class TestInexactNewton:
    @pytest.mark.parametrize("forcing", [0.5, 0.1, 1e-3])
    def test_each_sample_ends_its_space_where_its_own_residual_is_small_enough(self, forcing: float) -> None:
        """The step is the best in the smallest Krylov space that meets η, whatever the neighbours need."""
        solver = NewtonKrylov(forcing=forcing, line_search=0)
        rates = torch.tensor([[0.1], [0.6], [2.0], [7.0]]).double()

        def f(z: Tensor) -> Tensor:
            return torch.tanh(rates[: len(z)] * z @ W.mT + X[: len(z)])

        z0 = normal(7, 4, 6)
        s = iterates(solver, f, z0, 1)[1] - z0
        M, g = system(f, z0), f(z0) - z0
        sizes = []
        for i in range(4):
            bests = [best_in_krylov(torch.eye(6).double() - M[i], g[i], 0 * g[i], k) for k in range(1, 7)]
            enough = [float((g[i] - M[i] @ best).norm()) <= forcing * float(g[i].norm()) for best in bests]
            sizes.append(enough.index(True))
            assert torch.allclose(s[i], bests[sizes[i]], rtol=1e-8, atol=1e-10)
        assert len(set(sizes)) > 1

    def test_the_space_is_never_larger_than_max_krylov(self) -> None:
        solver, z0 = NewtonKrylov(forcing=0.0, max_krylov=2, line_search=0), normal(8, 4, 6)
        f = Budget(tanh_of, 100)
        state = solver.step(f, solver.init(f, z0))
        assert f.remaining == 100 - 1 - 1 - 2 - 1
        M, g = system(tanh_of, z0), tanh_of(z0) - z0
        for i in range(4):
            best = best_in_krylov(torch.eye(6).double() - M[i], g[i], 0 * g[i], 2)
            assert torch.allclose(state.z[i] - z0[i], best, rtol=1e-9, atol=1e-11)

    def test_forcing_terms_follow_progress(self) -> None:
        """Choice 2 of Eisenstat and Walker with its safeguard, sample by sample."""
        states = states_of(NewtonKrylov(), tanh_of, 3 * normal(9, 4, 6), 6)
        assert torch.equal(states[0].forcing, torch.full((4,), 0.5).double())
        guarded = 0
        for before, after in pairwise(states):
            eta = 0.9 * (l2(after.g) / l2(before.g)) ** 2
            floor = 0.9 * before.forcing**2
            guarded += int(((floor > 0.1) & (floor > eta)).sum())
            expected = torch.where(floor > 0.1, torch.maximum(eta, floor), eta).clamp(max=0.9)
            assert torch.allclose(after.forcing, expected, rtol=1e-12)
        assert guarded > 0

    def test_residuals_fall_superlinearly(self) -> None:
        """‖g(z + s)‖ <= η ‖g‖ + ½ c ‖s‖², with the η that the progress chose."""
        z0 = 0.3 * normal(6, 4, 6)
        states = states_of(NewtonKrylov(line_search=0), tanh_of, z0, 7)
        ratios = []
        for before, after in pairwise(states):
            step = l2(after.z - before.z)
            bound = before.forcing * l2(before.g) + 0.5 * SLOPE * 0.9**2 * step**2
            assert (l2(after.g) <= bound + 1e-15).all()
            ratios.append(float((l2(after.g) / l2(before.g)).max()))
        falling = [ratio for ratio, state in zip(ratios, states, strict=False) if float(l2(state.g).min()) > 1e-8]
        assert falling == sorted(falling, reverse=True)
        assert min(ratios) < 1e-4


class TestDifferences:
    def test_steps_are_those_of_exact_products_to_half_the_digits(self) -> None:
        z0 = normal(2, 4, 6)
        options: dict[str, Any] = {"forcing": 0.1, "line_search": 0}
        exact = iterates(NewtonKrylov(**options), tanh_of, z0, 4)
        found = iterates(NewtonKrylov(**options, differences=True), tanh_of, z0, 4)
        for one, other in zip(exact[1:], found[1:], strict=True):
            assert torch.allclose(one, other, rtol=1e-6, atol=1e-6)
        assert not torch.equal(exact[1], found[1])

    def test_an_f_whose_derivative_cannot_be_differentiated(self) -> None:
        class Once(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, z: Tensor) -> Tensor:
                ctx.save_for_backward(z)
                return z.cos()

            @staticmethod
            @torch.autograd.function.once_differentiable
            def backward(ctx: Any, g: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
                return -g * ctx.saved_tensors[0].sin()

        z, stats = fixed_point(
            lambda z, x: x * Once.apply(z), 0 * X, X.clone().requires_grad_(), solver=NewtonKrylov(differences=True),
            stopping=Stopping(rtol=1e-10, max_evals=200),
        )  # fmt: skip
        assert stats.converged.all()
        z.sum().backward()


class TestConvergence:
    @pytest.mark.parametrize("rate", [1.2, 5.0, 30.0])
    def test_where_picard_diverges(self, rate: float) -> None:
        """J rotates by a quarter turn and grows: Picard spirals out, I - J has singular values above 1."""
        turn = rate * torch.tensor([[0.0, -1.0], [1.0, 0.0]]).double()
        x, stopping = 0.3 * normal(4, 5, 2), Stopping(rtol=1e-10, atol=0, max_evals=300)
        exact, _ = solve_exactly(tanh_map, torch.zeros(5, 2), (turn, x)) if rate == 1.2 else (None, None)
        z, stats = fixed_point(tanh_map, torch.zeros(5, 2).double(), turn, x, solver=NewtonKrylov(), stopping=stopping)
        assert stats.converged.all()
        assert torch.allclose(z, tanh_map(z, turn, x), rtol=1e-8, atol=1e-11)
        assert exact is None or torch.allclose(z, exact, rtol=1e-8)
        assert not fixed_point(tanh_map, 0 * x, turn, x, solver=Picard(), stopping=stopping).stats.converged.any()

    def test_the_line_search_makes_newton_converge_from_afar(self) -> None:
        """g(z) = -arctan(z): full steps diverge from |z| > 1.3917."""

        def f(z: Tensor) -> Tensor:
            return z - torch.atan(z)

        z0, stopping = torch.tensor([[1.0], [1.5], [20.0]]).double(), Stopping(rtol=0, atol=1e-12, max_evals=100)
        full, searched = (
            fixed_point(f, z0, solver=NewtonKrylov(line_search=most), stopping=stopping, raise_nonfinite=False)
            for most in (0, 10)
        )
        assert full.stats.converged.tolist() == [True, False, False]
        assert searched.stats.converged.all()
        assert searched.z.abs().max() < 1e-12

    @pytest.mark.parametrize("budget", [3, 5, 9])
    def test_unrolled_it_is_differentiated_exactly(self, budget: int) -> None:
        solver, stopping = NewtonKrylov(), Stopping(rtol=0, atol=0, max_evals=budget)

        def layer(weight: Tensor, x: Tensor) -> Tensor:
            return fixed_point(tanh_map, 0 * X[:2], weight, x, solver=solver, stopping=stopping, adjoint=Unrolled()).z

        assert torch.autograd.gradcheck(layer, (W.clone().requires_grad_(), X[:2].clone().requires_grad_()))

    def test_implicit_and_unrolled_gradients_agree(self) -> None:
        weight, x = W.clone().requires_grad_(), X.clone().requires_grad_()
        stopping = Stopping(rtol=1e-12, max_evals=200)
        gradients = []
        for adjoint in (Implicit(stopping=stopping), Unrolled()):
            z = fixed_point(tanh_map, 0 * X, weight, x, solver=NewtonKrylov(), stopping=stopping, adjoint=adjoint).z
            gradients.append(torch.autograd.grad(z.square().sum(), (weight, x)))
        for implicit, unrolled in zip(*gradients, strict=True):
            assert torch.allclose(implicit, unrolled, rtol=1e-7, atol=1e-9)


class TestBatches:
    @pytest.mark.parametrize("line_search", [0, 5])
    def test_samples_do_not_influence_each_other(self, line_search: int) -> None:
        solver = NewtonKrylov(line_search=line_search)
        scale = torch.tensor([[0.1], [1.0], [3.0], [9.0]]).double()

        def f(z: Tensor, rows: slice = slice(None)) -> Tensor:
            return torch.tanh(z @ W.mT + (scale * X)[rows])

        z0 = 2 * normal(10, 4, 6)
        together = iterates(solver, f, z0, 6)
        for i in range(4):
            rows = slice(i, i + 1)
            alone = iterates(solver, lambda z, rows=rows: f(z, rows), z0[rows], 6)
            for one, all_ in zip(alone, together, strict=True):
                assert torch.allclose(one, all_[rows], rtol=1e-10, atol=1e-12)

    def test_a_solved_or_broken_neighbour_costs_nothing(self) -> None:
        """Zero residuals stay where they are; NaN stays NaN; neither asks for evaluations."""
        start = torch.tensor([[0.0, 0.0], [float("nan"), 1.0], [1.0, 2.0]]).double()
        turn = 0.9 * orthogonal(2)
        solver = NewtonKrylov(forcing=1e-8, line_search=0)

        def spent(z0: Tensor) -> tuple[int, Tensor]:
            f = Budget(lambda z: torch.tanh(z @ turn.mT), 100)
            state = solver.init(f, z0)
            for _ in range(3):
                state = solver.step(f, state)
            return f.remaining, state.z

        (alone, z_alone), (together, z) = spent(start[2:]), spent(start)
        assert alone == together
        assert torch.equal(z[0], start[0])
        assert z[1].isnan().any()
        assert torch.allclose(z[2:], z_alone, rtol=1e-12, atol=1e-15)

    def test_some_samples_alone_go_on_as_before(self) -> None:
        states = states_of(NewtonKrylov(), tanh_of, normal(2, 4, 6), 4)
        rows = torch.tensor([2, 0])
        part = states[2].take(rows)
        known = Unlimited(lambda z: tanh_map(z, W, X[rows]))
        for later in states[3:]:
            part = NewtonKrylov().step(known, part)
            assert torch.allclose(part.z, later.z[rows], rtol=1e-10, atol=1e-13)

    def test_smaller_batches_change_the_cost_alone(self) -> None:
        scale = torch.tensor([[0.1], [0.1], [0.1], [9.0]]).double()
        solved, rows = [], []
        for batch_dims in (None, (0,)):
            f = Counted(lambda z, x: torch.tanh(z @ W.mT + x))
            stopping = Stopping(rtol=1e-10, max_evals=300)
            solved.append(fixed_point(f, 0 * X, scale * X, solver=NewtonKrylov(), stopping=stopping, batch_dims=batch_dims))
            rows.append(f.rows)
        assert torch.allclose(solved[0].z, solved[1].z, rtol=1e-9, atol=1e-11)
        assert solved[0].stats.converged.all()
        assert solved[1].stats.converged.all()


class TestBudget:
    @pytest.mark.parametrize("budget", range(1, 30))
    @pytest.mark.parametrize("differences", [False, True])
    def test_is_never_exceeded_and_f_is_always_known(self, budget: int, differences: bool) -> None:
        f = Budget(tanh_of, budget)
        solver = NewtonKrylov(forcing=1e-3, line_search=4, differences=differences)
        state = solver.init(f, 5 * normal(11, 4, 6))
        while f.remaining:
            state = solver.step(f, state)
            assert torch.equal(state.fz, tanh_of(state.z))
            assert torch.equal(state.g, state.fz - state.z)

    def test_takes_a_plain_step_when_nothing_is_left_for_products(self) -> None:
        z0 = normal(12, 4, 6)
        for budget in (2, 3):
            f = Budget(tanh_of, budget)
            state = EXACT.step(f, EXACT.init(f, z0))
            assert torch.equal(state.z, z0 + (tanh_of(z0) - z0))
        f = Budget(tanh_of, 4)  # f and its Jacobian, one product, f at the end
        state = EXACT.step(f, EXACT.init(f, z0))
        assert f.remaining == 0
        M, g = system(tanh_of, z0), tanh_of(z0) - z0
        best = torch.stack([best_in_krylov(torch.eye(6).double() - M[i], g[i], 0 * g[i], 1) for i in range(4)])
        assert torch.allclose(state.z, z0 + best, rtol=1e-10)

    def test_products_count_as_evaluations(self) -> None:
        f = Counted(tanh_map)
        stats = fixed_point(f, 0 * X, W, X, solver=EXACT, stopping=Stopping(rtol=1e-10, max_evals=100)).stats
        assert stats.converged.all()
        steps = int(stats.steps.max())
        assert f.calls == steps + 2  # at z0; there again, with its Jacobian; at the end of each step, with its Jacobian
        assert stats.evaluations == f.calls + 6 * steps

    def test_exhausted(self) -> None:
        stats = fixed_point(
            tanh_map, 0 * X, W, X, solver=NewtonKrylov(), stopping=Stopping(rtol=0, atol=0, max_evals=9)
        ).stats
        assert stats.evaluations == 9
        assert stats.status.tolist() == [Status.EXHAUSTED] * 4


@pytest.mark.parametrize("forcing", [None, 0.0])
def test_a_singular_system_takes_a_plain_step(forcing: float | None) -> None:
    """f(z) = z + c has I - J = 0; beside it a sample that can be solved."""
    rates, c = torch.tensor([[1.0], [0.5]]).double(), normal(13, 2, 3)
    found = iterates(NewtonKrylov(forcing=forcing, line_search=0), lambda z: rates * z + c, 0 * c, 2)
    assert torch.allclose(found[1][0], c[0])
    assert torch.allclose(found[2][0], 2 * c[0])
    assert torch.allclose(found[1][1], 2 * c[1])
