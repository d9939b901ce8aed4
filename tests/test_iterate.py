"""The solve loop: statuses, the best iterate, frozen samples, smaller batches, the trace, the budget."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import PROBLEMS, Counted, diagonal_map, flat, normal, orthogonal, residual_of, tanh_map
from torch import Tensor
from torch.utils._pytree import tree_map

from equilibria import GMRES, Anderson, Broyden, NonFiniteError, Phantom, Picard, Solution, Status, Stopping, fixed_point
from equilibria.stopping import rms

SOLVERS: dict[str, Any] = {
    "picard": Picard(),
    "anderson": Anderson(),
    "broyden": Broyden(),
    "line search": Broyden(line_search=4),
    "gmres": GMRES(restart=4),
}
each_solver = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
each_root_solver = pytest.mark.parametrize("solver", list(SOLVERS.values())[:4], ids=list(SOLVERS)[:4])


def decaying(z: Tensor, rates: Tensor) -> Tensor:
    """z* = 1 for every sample; Picard's residual falls by the sample's own rate."""
    return 1 + rates * (z - 1)


RATES = torch.tensor([[0.1], [0.9], [0.5], [0.0]]).double()
START = torch.full((4, 3), 3.0).double()


class TestBudget:
    @each_root_solver
    @pytest.mark.parametrize("budget", range(1, 9))
    def test_is_spent_and_never_exceeded(self, solver: Any, budget: int) -> None:
        f = Counted(lambda z: z + 1.5 + torch.sin(z))  # no fixed point
        stats = fixed_point(f, torch.zeros(2, 1), solver=solver, stopping=Stopping(max_evals=budget)).stats
        assert stats.evaluations == f.calls == budget
        assert stats.status.tolist() == [Status.EXHAUSTED] * 2

    @each_root_solver
    def test_one_evaluation_returns_z0(self, solver: Any) -> None:
        problem = PROBLEMS["tanh_contraction"](3, (5,), torch.float64)
        z, stats = fixed_point(problem.f, problem.z0, *problem.args, solver=solver, stopping=Stopping(max_evals=1))
        assert torch.equal(z, problem.z0)
        assert stats.evaluations == 1
        assert stats.steps.tolist() == [0, 0, 0]
        assert torch.allclose(stats.residual, rms(residual_of(problem.f, problem.z0, *problem.args)), rtol=1e-14)

    @each_solver
    def test_a_solved_z0_costs_one_evaluation(self, solver: Any) -> None:
        z, stats = fixed_point(decaying, torch.ones(4, 3).double(), RATES, solver=solver)
        assert torch.equal(z, torch.ones(4, 3).double())
        assert stats.status.tolist() == [Status.CONVERGED] * 4
        assert stats.steps.tolist() == [0] * 4
        assert stats.residual.tolist() == [0.0] * 4
        assert stats.evaluations == 1

    @each_root_solver
    def test_zero_tolerance_ends_at_an_exact_fixed_point_or_with_the_budget(self, solver: Any) -> None:
        stopping = Stopping(rtol=0, atol=0, max_evals=30)
        stats = fixed_point(lambda z: torch.full_like(z, 2.0), START, solver=solver, stopping=stopping).stats
        assert stats.converged.all()
        assert stats.evaluations == 2
        stats = fixed_point(lambda z: torch.floor(z) + 1, START, solver=solver, stopping=stopping).stats  # has none
        assert stats.evaluations == 30
        assert (stats.status == Status.EXHAUSTED).all()


class TestReportedIsReturned:
    @each_root_solver
    @pytest.mark.parametrize("budget", [2, 3, 5, 8])
    def test_when_exhausted(self, solver: Any, budget: int) -> None:
        problem = PROBLEMS["tanh_expansion"](3, (2, 3), torch.float64)
        stopping = Stopping(rtol=1e-12, max_evals=budget)
        z, stats = fixed_point(problem.f, problem.z0, *problem.args, solver=solver, stopping=stopping)
        assert stats.status.tolist() == [Status.EXHAUSTED] * 3
        assert torch.allclose(stats.residual, rms(residual_of(problem.f, z, *problem.args)), rtol=1e-12)

    def test_the_best_iterate_is_returned_though_residuals_rise_later(self) -> None:
        """Picard on z ← 2 z + c(z) visits these; the residual falls, then rises for ever."""
        path = [8.0, 3.0, 1.0, 0.5, 2.0, 9.0, 30.0, 100.0]
        following = dict(pairwise(path))

        def f(z: Tensor) -> Tensor:
            return torch.tensor([[following[float(v)]] for v in z])

        z, stats = fixed_point(
            f, torch.tensor([[8.0]]), solver=Picard(), stopping=Stopping(rtol=0, max_evals=7, trace=True)
        )
        assert stats.trace is not None
        assert stats.trace.flatten().tolist() == [5.0, 2.0, 0.5, 1.5, 7.0, 21.0, 70.0]
        assert z.item() == 1.0
        assert stats.residual.item() == 0.5
        assert stats.relative.item() == 1.0
        assert stats.steps.item() == 6
        assert stats.status.item() == Status.EXHAUSTED

    @each_root_solver
    def test_is_the_smallest_of_the_trace(self, solver: Any) -> None:
        f = lambda z: 3 * torch.sin(3 * z) + z**2 / 4  # noqa: E731  (chaotic)
        z0 = normal(0, 5, 2)
        z, stats = fixed_point(
            f, z0, solver=solver, stopping=Stopping(rtol=1e-13, max_evals=25, trace=True), raise_nonfinite=False
        )
        assert stats.trace is not None
        finite = stats.trace.nan_to_num(float("inf"))
        unsolved = ~stats.converged
        assert unsolved.any()
        assert torch.equal(stats.residual[unsolved], finite.amin(0)[unsolved])
        assert torch.allclose(stats.residual, rms(f(z) - z), rtol=1e-9)


class TestFreezing:
    @each_root_solver
    def test_a_converged_sample_is_frozen(self, solver: Any) -> None:
        """What a sample gets is its answer alone, however long a neighbour takes."""
        slow = RATES.clone()
        slow[1] = 0.999
        stopping = Stopping(rtol=1e-3, max_evals=40)
        f = lambda z, rates: torch.sin(rates * z) + 1  # noqa: E731
        alone = [fixed_point(f, START[i : i + 1], slow[i : i + 1], solver=solver, stopping=stopping) for i in range(4)]
        z, stats = fixed_point(f, START, slow, solver=solver, stopping=stopping)
        assert stats.steps.unique().numel() > 2
        for i, (z_alone, stats_alone) in enumerate(alone):
            assert torch.allclose(z[i], z_alone[0], rtol=1e-12)
            assert stats.steps[i] == stats_alone.steps[0]
            assert stats.status[i] == stats_alone.status[0]
            assert torch.allclose(stats.residual[i], stats_alone.residual[0], rtol=1e-9, atol=1e-15)

    def test_picards_counts_per_sample(self) -> None:
        """Rates 0.1, 0.9, 0.5, 0: the residual 2 (1 - rate) rate^n is below 1e-3 after these many steps."""
        stopping = Stopping(rtol=0, atol=1e-3, max_evals=100, trace=True)
        z, stats = fixed_point(decaying, START, RATES, solver=Picard(), stopping=stopping)
        assert stats.steps.tolist() == [4, 51, 10, 1]
        assert stats.evaluations == 52
        expected = 1 + 2 * RATES ** stats.steps.unsqueeze(1)
        assert torch.allclose(z, expected.expand(4, 3), rtol=1e-12)

    @each_root_solver
    def test_the_smallest_residual_does_not_replace_a_frozen_one(self, solver: Any) -> None:
        """A frozen sample would come nearer with more steps; it must not, or its answer depended on its neighbours."""
        stopping = Stopping(rtol=0.2, atol=0, max_evals=60)
        f = lambda z, rates: torch.tanh(rates * z) + 1  # noqa: E731
        pair = torch.tensor([[0.5], [0.97]]).double()
        z, stats = fixed_point(f, START[:2], pair, solver=solver, stopping=stopping)
        tight = fixed_point(f, START[:2], pair, solver=solver, stopping=Stopping(rtol=1e-9, max_evals=60)).z
        assert stats.residual[0] > 0
        assert (z - tight)[0].abs().max() > 1e-4


@st.composite
def batches(draw: st.DrawFn) -> tuple[int, list[int], int]:
    """(seed, which of 8 samples make the batch, in which order, the place of the sample that is compared)"""
    members = draw(st.lists(st.integers(0, 7), min_size=1, max_size=8))
    return draw(st.integers(0, 100)), members, draw(st.integers(0, len(members) - 1))


def pool(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Eight samples from easy to hard (x of growing size, rates up to 0.98), and a W they share."""
    rates = torch.linspace(0.0, 0.98, 8).double().unsqueeze(1)
    return 0.98 * orthogonal(5, seed), rates, normal(seed, 8, 5)


def scaled_tanh(z: Tensor, W: Tensor, rates: Tensor, x: Tensor) -> Tensor:
    return rates * torch.tanh(z @ W.T + x)


class TestBatchIndependence:
    """A sample alone and in any batch gets the same z.

    Solved to 1e-4 only, compared to 1e-9: a sample moved by its neighbours would differ by about the tolerance, while the
    rounding of batched products (1e-16, times the condition of Anderson's and Broyden's small systems) stays far below.
    """

    stopping = Stopping(rtol=1e-4, max_evals=40)

    @each_root_solver
    @pytest.mark.parametrize("batch_dims", [None, (None, 0, 0)], ids=["whole", "smaller"])
    @settings(max_examples=25)
    @given(drawn=batches())
    def test_alone_and_in_any_batch(self, solver: Any, batch_dims: Any, drawn: tuple[int, list[int], int]) -> None:
        seed, members, place = drawn
        if isinstance(solver, Broyden) and solver.line_search:
            return  # its evaluations are shared: see below
        W, rates, x = pool(seed)
        one = slice(members[place], members[place] + 1)
        alone = fixed_point(
            scaled_tanh, torch.zeros(1, 5).double(), W, rates[one], x[one], solver=solver, stopping=self.stopping
        )
        z0 = torch.zeros(len(members), 5).double()
        z, stats = fixed_point(
            scaled_tanh, z0, W, rates[members], x[members], solver=solver, stopping=self.stopping, batch_dims=batch_dims
        )
        assert stats.status[place] == alone.stats.status[0]
        assert stats.steps[place] == alone.stats.steps[0]
        assert torch.allclose(z[place], alone.z[0], rtol=1e-9, atol=1e-9)
        assert torch.allclose(stats.residual[place], alone.stats.residual[0], rtol=1e-5, atol=1e-9)

    @settings(max_examples=25)
    @given(drawn=batches())
    def test_line_search_where_the_budget_suffices(self, drawn: tuple[int, list[int], int]) -> None:
        seed, members, place = drawn
        W, rates, x = pool(seed)
        one = slice(members[place], members[place] + 1)
        solver, stopping = Broyden(line_search=3), Stopping(rtol=1e-4, max_evals=1000)
        alone = fixed_point(
            scaled_tanh, torch.zeros(1, 5).double(), W, rates[one], x[one], solver=solver, stopping=stopping
        )
        z0 = torch.zeros(len(members), 5).double()
        z, _ = fixed_point(scaled_tanh, z0, W, rates[members], x[members], solver=solver, stopping=stopping)
        assert torch.allclose(z[place], alone.z[0], rtol=1e-9, atol=1e-9)

    @each_solver
    @pytest.mark.parametrize("batch_dims", [None, (0, 0)], ids=["whole", "smaller"])
    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e308])
    @pytest.mark.parametrize("place", [0, 2])
    def test_beside_a_sample_that_is_not_finite(self, solver: Any, batch_dims: Any, bad: float, place: int) -> None:
        """1e308 overflows in norms and products, a few steps later in z."""
        rates = torch.linspace(0.5, 0.9, 3).double().unsqueeze(1).repeat(1, 4)
        rates = rates * torch.tensor([0.2, 0.5, 0.8, 1.0]).double()
        b = normal(0, 3, 4)
        stopping = Stopping(rtol=1e-6, max_evals=200)
        clean = fixed_point(diagonal_map, 0 * b, rates, b, solver=solver, stopping=stopping)
        spoiled = b.clone()
        spoiled[place, 1] = bad
        worse = rates.clone()
        worse[place, 1] = 4.0
        z, stats = fixed_point(
            diagonal_map,
            0 * b,
            worse,
            spoiled,
            solver=solver,
            stopping=stopping,
            batch_dims=batch_dims,
            raise_nonfinite=False,
        )
        others = [i for i in range(3) if i != place]
        assert stats.converged[others].all()
        assert torch.allclose(z[others], clean.z[others], rtol=1e-9)
        assert torch.equal(stats.steps[others], clean.stats.steps[others])
        assert z.isfinite().all()


class TestSmallerBatches:
    @each_root_solver
    def test_evaluates_fewer_rows_for_the_same_result(self, solver: Any) -> None:
        W, _, x = pool(1)
        x = x.repeat(2, 1)
        rates = torch.full((16, 1), 0.1).double()
        rates[5], rates[11] = 0.98, 0.9
        stopping = Stopping(rtol=1e-7, max_evals=300, trace=True)

        def solve(batch_dims: Any) -> tuple[Counted, Solution]:
            f = Counted(scaled_tanh)
            solution = fixed_point(f, 0 * x, W, rates, x, solver=solver, stopping=stopping, batch_dims=batch_dims)
            return f, solution

        whole, (z, stats) = solve(None)
        smaller, (z_smaller, stats_smaller) = solve((None, 0, 0))
        assert whole.rows == 16 * whole.calls
        assert stats_smaller.evaluations == smaller.calls
        # No more than half are left once the 14 easy samples are done; from then on at most two rows are evaluated.
        easy = int(stats.steps[[i for i in range(16) if i not in (5, 11)]].max())
        assert smaller.rows < whole.rows
        if not (isinstance(solver, Broyden) and solver.line_search):
            assert smaller.calls == whole.calls
            assert smaller.rows <= 16 * (easy + 1) + 2 * (smaller.calls - easy - 1)
            assert torch.equal(stats.steps, stats_smaller.steps)
            assert stats.trace is not None
            assert stats_smaller.trace is not None
            assert torch.allclose(stats.trace, stats_smaller.trace, rtol=1e-3, atol=1e-9)
        assert torch.equal(stats.status, stats_smaller.status)
        assert torch.allclose(z, z_smaller, rtol=1e-9, atol=1e-9)

    def test_halves_again_and_again(self) -> None:
        """Picard with 8 rates: rows evaluated are those still running at the last halving."""
        rates = torch.tensor([[0.1], [0.2], [0.3], [0.4], [0.5], [0.6], [0.7], [0.97]]).double()
        f = Counted(decaying)
        stopping = Stopping(rtol=0, atol=1e-6, max_evals=1000)
        stats = fixed_point(
            f, torch.full((8, 1), 3.0).double(), rates, solver=Picard(), stopping=stopping, batch_dims=(0,)
        ).stats
        steps = stats.steps.tolist()
        assert steps == sorted(steps)
        # 8 rows until four are done, four until six are, two until seven are, one to the end; and 8 at z0.
        assert f.rows == 8 + 8 * steps[3] + 4 * (steps[5] - steps[3]) + 2 * (steps[6] - steps[5]) + (steps[7] - steps[6])
        assert f.calls == stats.evaluations == 1 + steps[7]

    def test_takes_the_batch_from_the_dimension_said(self) -> None:
        """Args that carry the batch first, last and not at all, alone and in a structure, beside one of another kind."""
        rates = torch.tensor([0.1, 0.95, 0.2, 0.3]).double()
        b = normal(0, 4, 3)
        shapes = set()

        def f(
            z: Tensor, first: dict[str, Tensor], last: tuple[Tensor, Tensor], whole: Tensor, k: int, none: None
        ) -> Tensor:
            shapes.add((len(z), first["r"].shape, last[0].shape, last[1].shape, whole.shape))
            return first["r"].unsqueeze(1) * torch.sin(z) + last[0].T + last[1][0, 0].unsqueeze(1) + k * whole

        args = ({"r": rates}, (b.T.contiguous(), normal(1, 2, 2, 4)), normal(2, 3), 2, None)
        z0 = torch.zeros(4, 3).double()
        whole = fixed_point(f, z0, *args, solver=Picard())
        assert {shape[0] for shape in shapes} == {4}
        smaller = fixed_point(f, z0, *args, solver=Picard(), batch_dims=(0, -1, None, 0, None))
        assert {shape[0] for shape in shapes} == {4, 1}
        assert (1, (1,), (3, 1), (2, 2, 1), (3,)) in shapes
        assert torch.allclose(whole.z, smaller.z, rtol=1e-12)

    @each_root_solver
    def test_a_nested_state(self, solver: Any) -> None:
        problem = PROBLEMS["nested"](6, (5,), torch.float64)
        z0 = tree_map(lambda leaf: leaf.clone(), problem.z0)
        stopping = Stopping(rtol=1e-9, max_evals=200)
        near = fixed_point(problem.f, z0, *problem.args, solver=solver, stopping=stopping).z
        z0["wide"][1:], z0["rest"][0][1:] = near["wide"][1:], near["rest"][0][1:]  # all but the first are solved already
        f = Counted(problem.f)
        z, stats = fixed_point(f, z0, *problem.args, solver=solver, stopping=stopping, batch_dims=problem.batch_dims)
        assert stats.converged.all()
        assert f.rows == 6 + (f.calls - 1)
        assert torch.allclose(flat(z), flat(problem.exact), rtol=1e-7, atol=1e-7)

    @pytest.mark.parametrize("adjoint", [Phantom()])
    def test_training_and_evaluation_alike(self, adjoint: Any) -> None:
        W, rates, x = pool(0)
        W.requires_grad_()
        trained = fixed_point(scaled_tanh, 0 * x, W, rates, x, adjoint=adjoint, batch_dims=(None, 0, 0))
        with torch.no_grad():
            evaluated = fixed_point(scaled_tanh, 0 * x, W, rates, x, adjoint=adjoint, batch_dims=(None, 0, 0))
        assert torch.equal(trained.z, evaluated.z)


class TestStatuses:
    def test_all_three_in_one_batch(self) -> None:
        rates = torch.tensor([[0.5], [0.999], [1e30]]).double()
        stopping = Stopping(rtol=1e-6, max_evals=50)
        z0, b = torch.ones(3, 1).double(), torch.ones(3, 1).double()
        stats = fixed_point(diagonal_map, z0, rates, b, solver=Picard(), stopping=stopping, raise_nonfinite=False).stats
        assert stats.status.tolist() == [Status.CONVERGED, Status.EXHAUSTED, Status.NONFINITE]
        assert stats.converged.tolist() == [True, False, False]
        # 1e30 times itself overflows at the 11th: f(z) is inf where z was still finite.
        assert stats.steps[2] == 10
        assert stats.steps[1] == 49

    @each_solver
    def test_not_finite_at_z0(self, solver: Any) -> None:
        z0 = torch.tensor([[1.0, 2.0], [float("nan"), 1.0], [1.0, float("inf")]]).double()
        z, stats = fixed_point(lambda z: 0.5 * z + 1, z0, solver=solver, raise_nonfinite=False)
        assert stats.status.tolist() == [Status.CONVERGED, Status.NONFINITE, Status.NONFINITE]
        assert stats.steps[1:].tolist() == [0, 0]
        assert not stats.residual[1:].isfinite().any()
        assert torch.allclose(z[1:], z0[1:], equal_nan=True)

    def test_not_finite_at_step_k(self) -> None:
        """Sample 1 walks up to 5, where f is NaN; what is returned for it is the best z before that."""

        def f(z: Tensor) -> Tensor:
            walk = torch.where(z < 5, z + 1, torch.full_like(z, float("nan")))
            return torch.cat((0.5 * z[:1], walk[1:]))

        stopping = Stopping(rtol=0, atol=1e-4, max_evals=50, trace=True)
        z, stats = fixed_point(f, torch.tensor([[1.0], [2.0]]), solver=Picard(), stopping=stopping, raise_nonfinite=False)
        assert stats.status.tolist() == [Status.CONVERGED, Status.NONFINITE]
        assert stats.steps[1] == 3
        assert z[1].item() == 2.0  # all residuals were 1: the first of them
        assert stats.residual[1] == 1.0
        assert stats.trace is not None
        assert stats.trace[:3, 1].tolist() == [1.0, 1.0, 1.0]
        assert stats.trace[3, 1].isnan()
        assert torch.equal(stats.trace[4:, 1], torch.ones(len(stats.trace) - 4))

    @each_root_solver
    def test_error_carries_the_solution(self, solver: Any) -> None:
        def f(z: dict[str, Tensor]) -> dict[str, Tensor]:
            return {"h": torch.cat((0.5 * z["h"][:1] + 1, torch.exp(z["h"][1:] ** 2 + 5)))}

        with pytest.raises(
            NonFiniteError, match=r"solve became inf or NaN in 1 of 2 samples \(first: sample 1; earliest at step \d+\)"
        ) as caught:
            fixed_point(f, {"h": torch.ones(2, 3)}, solver=solver)
        message = str(caught.value)
        assert "damping below 1" in message
        assert "raise_nonfinite=False" in message
        assert isinstance(caught.value, ArithmeticError)
        solution = caught.value.solution
        assert solution is not None
        assert solution.z["h"].shape == (2, 3)
        assert solution.z["h"].isfinite().all()
        assert solution.stats.status.tolist() == [Status.CONVERGED, Status.NONFINITE]
        returned = fixed_point(f, {"h": torch.ones(2, 3)}, solver=solver, raise_nonfinite=False)
        assert torch.equal(returned.z["h"], solution.z["h"])

    def test_exhausted_never_raises(self) -> None:
        assert (fixed_point(lambda z: -z + 1, torch.zeros(2, 1), solver=Picard()).stats.status == Status.EXHAUSTED).all()


class TestTrace:
    @each_root_solver
    @pytest.mark.parametrize("batch_dims", [None, (None, 0, 0)], ids=["whole", "smaller"])
    def test_what_it_holds(self, solver: Any, batch_dims: Any) -> None:
        W, rates, x = pool(3)
        stopping = Stopping(rtol=1e-6, max_evals=60, trace=True)
        stats = fixed_point(scaled_tanh, 0 * x, W, rates, x, solver=solver, stopping=stopping, batch_dims=batch_dims).stats
        trace = stats.trace
        assert stats.converged.all()
        assert trace is not None
        assert trace.shape == (1 + int(stats.steps.max()), 8)
        assert torch.allclose(trace[0], rms(scaled_tanh(0 * x, W, rates, x)), rtol=1e-12)
        assert torch.equal(trace[-1], stats.residual)
        for i, steps in enumerate(stats.steps.tolist()):
            assert (trace[steps:, i] == stats.residual[i]).all()  # a frozen sample repeats its last
            before = trace[:steps, i]
            assert (before > stats.residual[i]).all()

    def test_is_absent_by_default(self) -> None:
        assert fixed_point(lambda z: 0.5 * z, START).stats.trace is None

    @each_root_solver
    def test_has_one_row_for_one_evaluation(self, solver: Any) -> None:
        stats = fixed_point(decaying, START, RATES, solver=solver, stopping=Stopping(max_evals=1, trace=True)).stats
        assert stats.trace is not None
        assert stats.trace.shape == (1, 4)

    @each_root_solver
    def test_changes_nothing(self, solver: Any) -> None:
        problem = PROBLEMS["tanh_contraction"](3, (5,), torch.float64)
        with_trace, without = (
            fixed_point(problem.f, problem.z0, *problem.args, solver=solver, stopping=Stopping(trace=trace))
            for trace in (True, False)
        )
        assert torch.equal(with_trace.z, without.z)
        assert with_trace.stats.evaluations == without.stats.evaluations


@each_root_solver
@pytest.mark.parametrize("check_every", [2, 3, 7, 1000])
def test_check_every_only_wastes_evaluations(solver: Any, check_every: int) -> None:
    W, rates, x = pool(4)
    each, rarely = (
        fixed_point(scaled_tanh, 0 * x, W, rates, x, solver=solver,
                    stopping=Stopping(rtol=1e-5, max_evals=70, check_every=every))
        for every in (1, check_every)
    )  # fmt: skip
    assert torch.equal(each.z, rarely.z)
    assert torch.equal(each.stats.residual, rarely.stats.residual)
    assert torch.equal(each.stats.steps, rarely.stats.steps)
    assert torch.equal(each.stats.status, rarely.stats.status)
    assert each.stats.evaluations <= rarely.stats.evaluations <= 70
    if not (isinstance(solver, Broyden) and solver.line_search):
        steps = int(each.stats.steps.max())
        assert rarely.stats.evaluations == min(70, 1 + -(-steps // check_every) * check_every)


def test_a_large_state_is_solved_alike() -> None:
    """D above any block size of the arithmetic: the property is not one of small sizes."""
    W, x = 0.5 * orthogonal(300), normal(0, 3, 300)
    stopping = Stopping(rtol=1e-10, max_evals=100)
    z, stats = fixed_point(tanh_map, 0 * x, W, x, stopping=stopping)
    alone = fixed_point(tanh_map, 0 * x[:1], W, x[:1], stopping=stopping)
    assert stats.converged.all()
    assert torch.allclose(z[:1], alone.z, rtol=1e-9, atol=1e-11)
