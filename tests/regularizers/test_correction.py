"""Recorded states against solves that are stopped earlier, and the correction loss against its formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import PROBLEMS, Counted, diagonal_map, flat, normal, orthogonal, tanh_map
from steps import iterates
from torch import Tensor, nn

from equilibria import (
    DEQ,
    GMRES,
    Anderson,
    Broyden,
    Implicit,
    Phantom,
    Picard,
    Reversible,
    ReversiblePicard,
    Shine,
    Stopping,
    Unrolled,
    fixed_point,
)
from equilibria.regularizers import Recording, fixed_point_correction
from equilibria.solvers import Solver

SOLVERS: list[Solver[Any]] = [Picard(), Anderson(), Broyden()]
AT = (0, 1, 3, 6)


def problem() -> tuple[Tensor, Tensor, Tensor]:
    return 0.7 * orthogonal(5), normal(1, 3, 5), normal(2, 3, 5)


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_states_are_those_of_the_solver(solver: Solver[Any]) -> None:
    """f at the z that the solver reaches after k steps, driven by hand."""
    W, x, z0 = problem()
    recording = Recording(solver, at=AT)
    solution = fixed_point(tanh_map, z0, W, x, solver=recording, stopping=Stopping(rtol=0, max_evals=20))
    path = iterates(solver, lambda z: tanh_map(z, W, x), z0, max(AT))
    for k, state in zip(AT, recording.states(tanh_map, solution, W, x), strict=True):
        torch.testing.assert_close(state, tanh_map(path[k], W, x), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_states_are_those_of_a_solve_stopped_there(solver: Solver[Any]) -> None:
    """Where the residual falls at every step, so that the best iterate of the shorter solve is its last."""
    W, x, z0 = problem()
    recording = Recording(solver, at=AT)
    stopping = Stopping(rtol=0, max_evals=20, trace=True)
    solution = fixed_point(tanh_map, z0, W, x, solver=recording, stopping=stopping)
    trace = solution.stats.trace
    assert trace is not None
    for k, state in zip(AT, recording.states(tanh_map, solution, W, x), strict=True):
        falls = (trace[1 : k + 1] < trace[:k]).all(dim=0)
        assert falls.any()
        shorter = fixed_point(tanh_map, z0, W, x, solver=solver, stopping=Stopping(rtol=0, max_evals=k + 1)).z
        torch.testing.assert_close(state[falls], tanh_map(shorter, W, x)[falls], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
@pytest.mark.parametrize("name", ["nested", "one_hard", "tanh_expansion"])
def test_the_solve_is_the_same_and_costs_the_same(solver: Solver[Any], name: str) -> None:
    problem = PROBLEMS[name](5, (6,), torch.float64)
    stopping = Stopping(rtol=1e-6, max_evals=30)
    runs = []
    for used in (solver, Recording(solver, at=(2, 4))):
        f = Counted(problem.f)
        z, stats = fixed_point(f, problem.z0, *problem.args, solver=used, stopping=stopping, batch_dims=problem.batch_dims)
        runs.append((flat(z), stats, f.calls, f.rows))
    (z, stats, calls, rows), (recorded, recorded_stats, *cost) = runs
    assert torch.equal(z, recorded)
    assert torch.equal(stats.steps, recorded_stats.steps)
    assert stats.evaluations == recorded_stats.evaluations
    assert cost == [calls, rows]


@pytest.mark.parametrize("batch_dims", [None, (0, 0)])
def test_a_sample_that_stopped_earlier_takes_part_with_what_was_returned(batch_dims: tuple[int, int] | None) -> None:
    """Also where the samples that are left were solved in a batch of their own."""
    hard = PROBLEMS["one_hard"](5, (4,), torch.float64)
    recording = Recording(Picard(), at=(2, 30))
    stopping = Stopping(rtol=1e-6, max_evals=400)
    solution = fixed_point(diagonal_map, hard.z0, *hard.args, solver=recording, stopping=stopping, batch_dims=batch_dims)
    stopped = solution.stats.steps < 30
    assert stopped.tolist() == [True, True, False, True, True]
    early, late = recording.states(diagonal_map, solution, *hard.args)
    rates, b = hard.args
    assert torch.equal(late[stopped], diagonal_map(solution.z, rates, b)[stopped])
    for k, state in ((2, early), (30, late)):  # Picard from 0: after k steps Σ_{i<k} rateⁱ b, and f once more
        exact = b * (1 - rates ** (k + 1)) / (1 - rates)
        moving = solution.stats.steps >= k
        torch.testing.assert_close(state[moving], exact[moving], rtol=1e-12, atol=1e-13)


def test_alone_and_in_a_batch() -> None:
    hard = PROBLEMS["one_hard"](5, (4,), torch.float64)
    recording = Recording(Anderson(), at=(3, 12))
    stopping = Stopping(rtol=1e-6, max_evals=60)

    def states(z0: Tensor, *args: Tensor) -> list[Tensor]:
        solution = fixed_point(diagonal_map, z0, *args, solver=recording, stopping=stopping)
        return recording.states(diagonal_map, solution, *args)

    whole = states(hard.z0, *hard.args)
    for i in range(5):
        alone = states(*(value[i : i + 1] for value in (hard.z0, *hard.args)))
        for one, many in zip(alone, whole, strict=True):
            torch.testing.assert_close(one[0], many[i], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("gamma", [0.5, 1.0])
@pytest.mark.parametrize("adjoint", [Implicit(), Unrolled()], ids=["implicit", "unrolled"])
def test_gradient_follows_the_formula(gamma: float, adjoint: Any) -> None:
    """∂/∂W Σ γⁿ⁻ⁱ ℓ(f(zᵢ, W)), each zᵢ constant, plus the gradient of the solution itself."""
    W, x, z0 = problem()
    W.requires_grad_()
    target = normal(3, 3, 5)

    def loss(z: Tensor) -> Tensor:
        return (z - target).square().mean()

    recording = Recording(Anderson(), at=(1, 4))
    stopping = Stopping(rtol=1e-12, max_evals=60)
    solution = fixed_point(tanh_map, z0, W, x, solver=recording, stopping=stopping, adjoint=adjoint)
    states = recording.states(tanh_map, solution, W, x)
    total = fixed_point_correction(loss, [*states, solution.z], gamma=gamma)
    (gradient,) = torch.autograd.grad(total, W, retain_graph=True)

    path = iterates(Anderson(), lambda z: tanh_map(z, W, x).detach(), z0, 4)
    (expected,) = torch.autograd.grad(loss(solution.z), W)
    value = loss(solution.z)
    for weight, z in ((gamma**2, path[1]), (gamma, path[4])):
        fz = torch.tanh(z @ W.mT + x)
        pulled = 2 * (fz - target) / fz.numel() * (1 - fz**2)  # ∂ℓ/∂(W z + x)
        expected = expected + weight * pulled.mT @ z
        value = value + weight * loss(fz)
    torch.testing.assert_close(total, value, rtol=1e-11, atol=0.0)
    torch.testing.assert_close(gradient, expected.detach(), rtol=1e-10, atol=1e-12)


def test_phantom_steps_are_recorded_from_the_state() -> None:
    W, x, z0 = problem()
    W.requires_grad_()
    recording = Recording(Picard(), at=(2,))
    solution = fixed_point(tanh_map, z0, W, x, solver=recording, stopping=Stopping(rtol=0, max_evals=8))
    (state,) = recording.states(tanh_map, solution, W, x, phantom=Phantom(steps=3, damping=0.5))
    z = tanh_map(tanh_map(z0, W, x), W, x).detach()
    for _ in range(3):
        z = 0.5 * z + 0.5 * tanh_map(z, W, x)
    torch.testing.assert_close(state, z, rtol=1e-12, atol=0.0)
    found, expected = (torch.autograd.grad(value.sum(), W)[0] for value in (state, z))
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)


def test_with_a_module_and_a_nested_state() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def initial(self, x: Tensor) -> dict[str, Tensor]:
            return {"a": torch.zeros_like(x), "b": x.new_zeros(len(x), 2)}

        def forward(self, z: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
            return {"a": torch.tanh(0.3 * self.linear(z["a"]) + x), "b": 0.5 * z["b"] + z["a"][:, :2]}

    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    recording = Recording(Anderson(), at=(1, 2))
    deq = DEQ(Block(), solver=recording)
    solution = deq(x)
    states = recording.states(deq.block, solution, x)
    assert [sorted(state) for state in states] == [["a", "b"]] * 2
    fixed_point_correction(lambda z: z["b"].square().mean(), [*states, solution.z]).backward()
    weight = deq.get_parameter("block.linear.weight")
    assert weight.grad is not None
    assert weight.grad.abs().max() > 0


def test_a_sample_that_fails_takes_part_with_its_last_finite_state() -> None:
    def f(z: Tensor, rate: Tensor) -> Tensor:
        return torch.where(z > 10, float("nan"), rate * z + 1.0)

    rate = torch.tensor([[0.5], [3.0]], requires_grad=True)
    recording = Recording(Picard(), at=(2, 3, 4, 8))  # the second reaches 13 at step 3
    stopping = Stopping(rtol=0, max_evals=20)
    solution = fixed_point(f, torch.zeros(2, 1), rate, solver=recording, stopping=stopping, raise_nonfinite=False)
    assert solution.stats.steps[1] == 3
    first, *others = recording.states(f, solution, rate)
    assert first[1] == 13
    for state in others:
        assert torch.equal(state[1], f(solution.z, rate)[1])


def test_a_sample_out_of_budget_takes_part_with_its_last_state_even_if_another_was_better() -> None:
    recording = Recording(Picard(), at=(3,))
    rate = torch.tensor(2.0)
    solution = fixed_point(lambda z, rate: rate * z + 1, torch.zeros(1, 1), rate, solver=recording,
                           stopping=Stopping(max_evals=4))  # fmt: skip
    assert solution.z == 0
    assert recording.states(lambda z, rate: rate * z + 1, solution, rate) == [torch.tensor([[15.0]])]


class TestMisuse:
    @pytest.mark.parametrize("at", [(), (3, 2), (1, 1), (-1,), (1.5,)])
    def test_steps(self, at: Any) -> None:
        with pytest.raises(ValueError, match="increasing steps >= 0"):
            Recording(Anderson(), at=at)

    def test_solvers(self) -> None:
        with pytest.raises(TypeError, match="is no solver"):
            Recording("anderson", at=(1,))  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="affine maps alone"):
            Recording(GMRES(), at=(1,))

    @pytest.mark.parametrize(("solver", "adjoint"), [(Broyden(), Shine()), (ReversiblePicard(), Reversible())], ids=repr)
    def test_adjoints_that_need_to_know_their_solver(self, solver: Solver[Any], adjoint: Any) -> None:
        W, x, z0 = problem()
        with pytest.raises(ValueError, match="instead of Recording"):
            fixed_point(tanh_map, z0, W, x, solver=Recording(solver, at=(1,)), adjoint=adjoint)

    def test_of_another_solve(self) -> None:
        W, x, z0 = problem()
        recording = Recording(Picard(), at=(1,))
        solution = fixed_point(tanh_map, z0, W, x)
        with pytest.raises(ValueError, match="with a Recording as its solver"):
            recording.states(tanh_map, solution, W, x)

    @pytest.mark.parametrize("gamma", [0.0, 1.5, float("nan")])
    def test_gamma(self, gamma: float) -> None:
        with pytest.raises(ValueError, match="gamma must lie in"):
            fixed_point_correction(torch.sum, [torch.ones(1)], gamma=gamma)

    def test_no_states(self) -> None:
        with pytest.raises(ValueError, match="there are no states"):
            fixed_point_correction(torch.sum, [])
