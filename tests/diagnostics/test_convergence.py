"""Observed rates against the spectral radius, and what a picture of a solve shows."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import affine_map, normal, normal_matrix, orthogonal, tanh_map
from torch import Tensor

from equilibria import Anderson, Picard, Solution, Stopping, fixed_point
from equilibria.diagnostics import contraction_rate, plot_convergence, spectral_radius
from equilibria.solvers import Solver


def solve(batch: int, *, max_evals: int = 40, rtol: float = 1e-6, trace: bool = True) -> Solution:
    """Samples of different difficulty."""
    W, x = 0.9 * orthogonal(6), torch.linspace(0.05, 2, batch).double().unsqueeze(1) * normal(1, batch, 6)
    stopping = Stopping(rtol=rtol, max_evals=max_evals, trace=trace)
    return fixed_point(tanh_map, torch.zeros_like(x), W, x, solver=Picard(), stopping=stopping)


def from_one(solver: Solver[Any], rates: Tensor, stopping: Stopping, **options: Any) -> Solution:
    return fixed_point(
        lambda z, rates: rates * z, torch.ones_like(rates), rates, solver=solver, stopping=stopping, **options
    )


class TestRate:
    @pytest.mark.parametrize("damping", [1.0, 0.5])
    def test_of_picard_is_the_spectral_radius(self, damping: float) -> None:
        """Of (1 - damping) I + damping A, for a normal A whose dominant eigenvalues are a rotation."""
        A = normal_matrix(torch.tensor([0.3, -0.2]), ((0.9, 2.0),))
        z0 = normal(0, 3, 4)
        stopping = Stopping(rtol=0, atol=0, max_evals=150, trace=True)
        solution = fixed_point(affine_map, z0, A, 0 * z0, solver=Picard(damping=damping), stopping=stopping)
        step = (1 - damping) * torch.eye(4).double() + damping * A
        radius = spectral_radius(affine_map, solution.z, step, 0 * z0).radius
        assert torch.allclose(contraction_rate(solution, tail=50), radius, rtol=1e-3)

    def test_acceleration_beats_it(self) -> None:
        A = normal_matrix(torch.linspace(-0.9, 0.9, 12))
        b = normal(0, 2, 12)
        stopping = Stopping(rtol=1e-8, max_evals=60, trace=True)
        solution = fixed_point(affine_map, 0 * b, A, b, solver=Anderson(), stopping=stopping)
        assert (contraction_rate(solution, tail=1000) < 0.8).all()

    def test_is_the_mean_over_the_tail_of_every_sample(self) -> None:
        """By hand, from samples that stop at different steps."""
        solution = solve(5)
        trace, steps = solution.stats.trace, solution.stats.steps
        assert trace is not None
        assert len(set(steps.tolist())) > 1
        for tail in (1, 4):
            for b, rate in enumerate(contraction_rate(solution, tail=tail).tolist()):
                s = int(steps[b])
                assert rate == pytest.approx(float(trace[s, b] / trace[s - tail, b]) ** (1 / tail), rel=1e-12)

    def test_a_tail_longer_than_the_solve(self) -> None:
        rates = torch.tensor([[0.1], [0.5]]).double()
        solution = from_one(Picard(), rates, Stopping(rtol=0, atol=1e-3, trace=True))
        assert torch.allclose(contraction_rate(solution, tail=50), rates.squeeze(1), rtol=1e-12)

    def test_of_a_sample_that_took_no_step_or_failed(self) -> None:
        rates = torch.tensor([[0.0], [0.5], [1e60]], dtype=torch.float64)
        stopping = Stopping(rtol=1e-3, max_evals=8, trace=True)
        solution = from_one(Picard(), rates, stopping, raise_nonfinite=False)
        assert solution.stats.steps.tolist() == [1, 7, 5]  # f(1) = 0; 0.5ⁿ; 1e360 is inf
        assert contraction_rate(solution).tolist() == pytest.approx([0.0, 0.5, 1e60])
        still = fixed_point(torch.zeros_like, torch.zeros(1, 1), stopping=stopping)
        assert contraction_rate(still).isnan().all()
        broken = fixed_point(torch.sqrt, -torch.ones(1, 1), stopping=stopping, raise_nonfinite=False)
        assert contraction_rate(broken).isnan().all()

    def test_needs_a_trace(self) -> None:
        with pytest.raises(ValueError, match=r"Stopping\(trace=True\)"):
            contraction_rate(solve(1, trace=False))

    def test_refuses_other_things(self) -> None:
        with pytest.raises(TypeError, match="give the Solution of a solve"):
            contraction_rate(torch.zeros(3))  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="tail must be an integer >= 1"):
            contraction_rate(solve(1), tail=0)


def lines_of(ax: Any) -> list[Any]:
    return ax.get_lines()


def labels(ax: Any) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]


class TestPlot:
    pytest.importorskip("matplotlib")

    def test_few_samples_are_drawn_one_by_one(self) -> None:
        """Each up to its own last step, with the residuals of the trace."""
        solution = solve(4)
        stats = solution.stats
        assert stats.trace is not None
        ax = plot_convergence(solution)
        assert ax.get_yscale() == "log"
        lines = lines_of(ax)
        assert len(lines) == 4
        for b, line in enumerate(lines):
            expected = stats.trace[: int(stats.steps[b]) + 1, b].tolist()
            assert list(line.get_ydata()) == pytest.approx(expected, rel=1e-12)
            assert list(line.get_xdata()) == list(range(len(expected)))

    def test_many_are_a_median_a_band_and_the_worst(self) -> None:
        solution = solve(100, max_evals=12)
        stats = solution.stats
        assert stats.trace is not None
        ax = plot_convergence(stats, worst=2, quantiles=(0.0, 1.0))
        median, *worst = lines_of(ax)
        assert list(median.get_ydata()) == pytest.approx(stats.trace.quantile(0.5, dim=1).tolist(), rel=1e-12)
        band = ax.collections[0].get_paths()[0].get_extents()
        assert (band.ymin, band.ymax) == pytest.approx((float(stats.trace.min()), float(stats.trace.max())), rel=1e-12)
        expected = stats.residual.argsort(descending=True)[:2].tolist()
        assert [str(line.get_label()) for line in worst] == [f"sample {b}, out of budget" for b in expected]

    def test_says_how_it_ended(self) -> None:
        rates = torch.tensor([[0.1], [0.99], [1e60]], dtype=torch.float64)
        solution = from_one(Picard(), rates, Stopping(rtol=0, atol=1e-3, trace=True), raise_nonfinite=False)
        ax = plot_convergence(solution)
        assert ax.get_title() == "1 of 3 converged, 1 out of budget, 1 inf or NaN; evaluations: 100"
        assert labels(ax) == ["sample 0", "sample 1, out of budget", "sample 2, inf or NaN"]

    def test_limits_are_drawn_where_they_are_known(self) -> None:
        stopping = Stopping(rtol=0, atol=1e-3, max_evals=30, trace=True)
        solution = from_one(Picard(), torch.full((9, 1), 0.5), stopping)
        assert not any("budget" in label or "tolerance" in label for label in labels(plot_convergence(solution)))
        ax = plot_convergence(solution, stopping=stopping, worst=0)
        _, tolerance, budget = lines_of(ax)
        assert tolerance.get_ydata()[0] == pytest.approx(1e-3)
        assert budget.get_xdata()[0] == 29

    def test_of_a_solve_that_was_done_at_once(self) -> None:
        stopping = Stopping(trace=True)
        ax = plot_convergence(fixed_point(torch.zeros_like, torch.zeros(2, 1), stopping=stopping), stopping=stopping)
        assert ax.get_title().startswith("2 of 2 converged")

    @pytest.mark.parametrize("batch", [1, 8, 1000])
    def test_can_be_saved(self, batch: int, tmp_path: Path) -> None:
        ax = plot_convergence(solve(batch))
        figure: Any = ax.figure
        figure.savefig(tmp_path / "convergence.png")
        assert (tmp_path / "convergence.png").stat().st_size > 5000

    def test_into_axes_that_are_given(self) -> None:
        from matplotlib.figure import Figure

        left, right = Figure().subplots(1, 2)
        assert plot_convergence(solve(2), left) is left
        assert not right.get_lines()

    def test_leaves_pyplot_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it fails
        plot_convergence(solve(1))

    def test_without_matplotlib_it_says_what_to_install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        with pytest.raises(ImportError, match="pip install matplotlib"):
            plot_convergence(solve(1))

    def test_refuses_what_makes_no_sense(self) -> None:
        with pytest.raises(ValueError, match=r"Stopping\(trace=True\)"):
            plot_convergence(solve(1, trace=False))
        with pytest.raises(ValueError, match="0 <= low <= high <= 1"):
            plot_convergence(solve(9), quantiles=(0.9, 0.1))
        with pytest.raises(ValueError, match="worst must be an integer >= 0"):
            plot_convergence(solve(9), worst=-1)
