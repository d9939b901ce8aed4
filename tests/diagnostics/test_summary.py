"""Each piece of advice on a map where it must be given, and on one where it must not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import PROBLEMS, affine_map, diagonal_map, jacobian, normal, normal_matrix, orthogonal, tanh_map
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from equilibria import (
    DEQ,
    GMRES,
    Anderson,
    Broyden,
    Implicit,
    Neumann,
    Phantom,
    Picard,
    Shine,
    Stopping,
    Unrolled,
    fixed_point,
)
from equilibria.diagnostics import Summary, summary
from equilibria.nn import MonotoneBlock, MonotoneDEQ

TIGHT = Stopping(rtol=1e-8, max_evals=100)


def rates(*rows: list[float]) -> tuple[Tensor, Tensor, Tensor]:
    """z0, rates and b of `diagonal_map`."""
    values = torch.tensor(rows, dtype=torch.float64)
    return torch.zeros_like(values), values, torch.ones_like(values)


def of_rates(*rows: list[float], **options: Any) -> Summary:
    return summary(diagonal_map, *rates(*rows), **{"stopping": TIGHT, **options})


def says(found: Summary, words: str) -> bool:
    return any(words in text for text in found.advice)


class TestAdvice:
    def test_none_on_a_good_map(self) -> None:
        found = of_rates([0.5, -0.3, 0.1], [0.2, 0.3, 0.4])
        assert found.advice == ()
        assert str(found).endswith("- nothing stands out")

    def test_expansive(self) -> None:
        found = of_rates([-1.3, 0.1], [0.5, 0.1])
        assert says(found, "f is expansive here (spectral radius 1.30, at least 1 in 1 of 2 samples)")
        assert not says(of_rates([-0.9, 0.1], [0.5, 0.1]), "expansive")

    def test_expansive_by_a_rotation(self) -> None:
        A = normal_matrix(torch.tensor([0.1]), ((1.2, 1.5),))
        z = torch.zeros(1, 3).double()
        assert says(summary(affine_map, z, A, z + 1, stopping=TIGHT), "f is expansive here (spectral radius 1.20")

    def test_slow(self) -> None:
        found = of_rates([0.98, 0.1])
        assert says(found, "f contracts slowly (spectral radius 0.980): plain iteration takes 114 steps per digit")
        assert not says(of_rates([0.9, 0.1]), "slowly")
        assert not says(of_rates([-1.3, 0.1]), "slowly")

    def test_nearly_singular(self) -> None:
        found = of_rates([1 - 1e-6, 0.0], [0.5, 0.0])
        assert says(found, "the backward system is nearly singular (condition 1e+06): gradients are unreliable")
        assert not says(of_rates([1 - 1e-3, 0.0]), "singular")

    def test_out_of_budget(self) -> None:
        """Two of five samples contract by 0.9 per step, the others by 0.1, from a residual of 1 to 1e-6."""
        slow, fast = [0.9, 0.0], [0.1, 0.0]
        stopping = Stopping(rtol=0, atol=1e-6, max_evals=30)
        found = of_rates(slow, fast, fast, slow, fast, solver=Picard(), stopping=stopping)
        assert says(found, "the budget of 30 evaluations is spent by 40% of samples: raise max_evals")
        (text,) = (text for text in found.advice if "budget" in text)
        needed = int(text.rsplit(" ", 1)[1].rstrip(")"))  # and neither much less nor much more
        enough = Stopping(rtol=0, atol=1e-6, max_evals=needed)
        assert not says(of_rates(slow, fast, solver=Picard(), stopping=enough), "budget")
        short = Stopping(rtol=0, atol=1e-6, max_evals=needed - 3)
        assert says(of_rates(slow, fast, solver=Picard(), stopping=short), "budget")

    @pytest.mark.parametrize("rate", [-1.0, 0.999])
    def test_out_of_budget_where_more_of_it_does_not_help(self, rate: float) -> None:
        found = of_rates([rate], solver=Picard(), stopping=Stopping(rtol=1e-8, max_evals=30))
        assert says(found, "more evaluations alone will not do")
        assert not says(found, "raise max_evals (")

    def test_nonfinite(self) -> None:
        def f(z: Tensor, a: Tensor) -> Tensor:
            return torch.where(z > 10, float("nan"), a * z + 1)

        a = torch.tensor([[0.5], [3.0]], dtype=torch.float64)
        found = summary(f, torch.zeros_like(a), a, solver=Picard(), stopping=TIGHT)
        assert says(found, "the solve became inf or NaN in 1 of 2 samples (first: sample 1)")
        assert not says(of_rates([0.5]), "NaN")

    def test_backward_out_of_budget(self) -> None:
        A = normal_matrix(torch.linspace(-0.9, 0.99, 30))
        b = normal(0, 2, 30)
        found = summary(affine_map, b, A, b, stopping=TIGHT, adjoint=Implicit(stopping=Stopping(max_evals=5)))
        assert says(found, "the backward solve does not converge within 5 evaluations in 2 of 2 samples")
        assert not says(summary(affine_map, b, A, b, stopping=TIGHT), "backward solve")

    def test_backward_nonfinite(self) -> None:
        a = torch.tensor([[1.0]], dtype=torch.float64)  # √z has no derivative at its fixed point 0
        found = summary(lambda z, a: a * z.abs().sqrt(), torch.zeros(1, 1).double(), a)
        assert found.backward_failed
        assert says(found, "the backward solve became inf or NaN")
        assert "unknown" in str(found)
        assert not of_rates([0.5]).backward_failed

    def test_hasty(self) -> None:
        loose = Stopping(rtol=1e-2)
        found = of_rates([0.05, 0.01], stopping=loose)
        assert says(
            found, f"converged in {found.stats.evaluations} evaluations at rtol 1e-02: the tolerance may be too loose"
        )
        for other in (
            of_rates([0.05, 0.01], stopping=Stopping(rtol=1e-6)),  # tight
            of_rates([0.0, 0.0], stopping=loose),  # exact
            of_rates([0.9, 0.5], stopping=loose),  # hard enough
        ):
            assert not says(other, "too loose")


class TestNumbers:
    @pytest.mark.parametrize("name", sorted(PROBLEMS))
    def test_agree_with_the_dense_jacobian(self, name: str) -> None:
        problem = PROBLEMS[name](3, (2, 3), torch.float64)
        dims = problem.batch_dims
        stopping = Stopping(rtol=1e-10, max_evals=200)
        found = summary(problem.f, problem.z0, *problem.args, stopping=stopping, batch_dims=dims)
        J = jacobian(problem.f, problem.exact, *problem.args)
        assert found.converged == 1.0
        assert torch.allclose(found.radius.radius, torch.linalg.eigvals(J).abs().amax(dim=1), rtol=1e-3, atol=1e-12)
        condition = torch.linalg.cond(torch.eye(6 + 3 * (name == "nested")).double() - J)
        assert torch.allclose(found.conditioning.condition, condition, rtol=1e-6)

    def test_costs_are_those_of_the_solves(self) -> None:
        args = rates([0.9, 0.1], [-0.5, 0.3])
        args[1].requires_grad_()
        solution = fixed_point(diagonal_map, *args, stopping=TIGHT)
        solution.z.sum().backward()
        found = summary(diagonal_map, *args, stopping=TIGHT)
        assert found.stats.evaluations == solution.stats.evaluations
        assert torch.equal(found.stats.residual, solution.stats.residual)
        assert found.backward is not None
        assert found.backward.evaluations == solution.stats.backward[0].evaluations

    def test_leaves_the_args_alone(self) -> None:
        args = rates([0.9, 0.1])
        summary(diagonal_map, *args)
        assert not any(arg.requires_grad for arg in args)

    def test_rate_of_picard(self) -> None:
        assert of_rates([0.6], solver=Picard()).rate.tolist() == pytest.approx([0.6])

    @pytest.mark.parametrize("adjoint", [Phantom(), Unrolled(), Neumann()])
    def test_without_a_backward_solve(self, adjoint: Any) -> None:
        found = of_rates([0.5, 0.1], adjoint=adjoint)
        assert found.backward is None
        assert "backward" not in str(found)

    def test_with_shine(self) -> None:
        found = of_rates([0.9, -0.5, 0.1], solver=Broyden(), adjoint=Shine())
        assert found.backward is not None
        assert found.advice == ()

    def test_of_a_map_without_args(self) -> None:
        found = summary(torch.cos, torch.zeros(1, 1), solver=Anderson())
        assert found.radius.radius.tolist() == pytest.approx([0.6736], rel=1e-3)  # sin of the fixed point
        assert found.backward is None


class Cell(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.outer = nn.Linear(3, 5).double()
        self.weight = nn.Parameter(scale * orthogonal(5))

    def initial(self, x: Tensor) -> Tensor:
        return x.new_zeros(len(x), 5)

    def prepare(self, x: Tensor) -> tuple[Tensor]:
        return (0.1 * self.outer(x),)

    def forward(self, z: Tensor, u: Tensor) -> Tensor:
        return torch.tanh(z @ self.weight.mT + u)


class TestLayers:
    def test_is_solved_as_it_is_set_up_and_left_as_it_was(self) -> None:
        layer = DEQ(Cell(0.9), stopping=TIGHT, eval_stopping=Stopping(rtol=1e-2))
        before = dict(vars(layer))
        x = normal(0, 4, 3)
        random = torch.get_rng_state()
        found = summary(layer, x)
        assert vars(layer) == before
        assert torch.equal(torch.get_rng_state(), random)
        assert all(parameter.grad is None for parameter in layer.parameters())
        assert torch.equal(found.stats.residual, layer(x).stats.residual)
        assert summary(layer.eval(), x).stopping.rtol == 1e-2

    @pytest.mark.parametrize("scale", [0.5, 1.1])
    def test_agrees_with_the_map(self, scale: float) -> None:
        cell = Cell(scale)
        x = normal(0, 4, 3)
        u = cell.prepare(x)[0].detach()
        of_layer = summary(DEQ(cell, stopping=TIGHT), x)
        of_map = summary(tanh_map, torch.zeros(4, 5).double(), cell.weight, u, stopping=TIGHT)
        assert str(of_layer) == str(of_map)

    def test_under_no_grad_it_says_the_same(self) -> None:
        layer, x = DEQ(Cell(0.9), stopping=TIGHT), normal(0, 4, 3)
        expected = str(summary(layer, x))
        with torch.no_grad():
            assert str(summary(layer, x)) == expected

    def test_with_weight_norm(self) -> None:
        """Whose weights are computed before the solve; written out, the same layer is the same."""
        cell = Cell(0.9)
        plain = str(summary(DEQ(cell, stopping=TIGHT), normal(0, 4, 3)))
        weight_norm(cell, "weight")
        assert str(summary(DEQ(cell, stopping=TIGHT), normal(0, 4, 3))) == plain

    def test_monotone(self) -> None:
        layer = MonotoneDEQ(MonotoneBlock(3, 5)).double()
        found = summary(layer, normal(0, 4, 3))
        assert found.converged == 1.0
        assert found.backward is not None

    def test_refuses_options_that_the_layer_has(self) -> None:
        with pytest.raises(TypeError, match="has its own solver; leave it out"):
            summary(DEQ(Cell(0.5)), normal(0, 4, 3), solver=GMRES())


def test_its_page() -> None:
    lines = str(of_rates([-1.3, 0.1], [0.5, 0.1])).splitlines()
    assert [line[:20].rstrip() for line in lines[:6]] == [
        "converged", "evaluations", "relative residual", "contraction rate", "spectral radius", "condition of I - J",
    ]  # fmt: skip
    assert lines[0].endswith("2 of 2 samples")
    assert lines[4].endswith("median 0.500, worst 1.300")
    assert lines[5].endswith("median 1.8, worst 2.6")
    assert lines[6].startswith("- f is expansive here")
