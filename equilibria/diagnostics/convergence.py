"""How a solve went: the rate at which residuals fell, and a picture of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from equilibria.solution import Solution, Stats, Status
from equilibria.solvers.solver import check_count
from equilibria.stopping import Stopping

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, ORANGE, GREEN, RED, GREY = "#1f5fa8", "#d9731a", "#2f8f5b", "#b3202c", "#6f6f6f"
ENDS = {  # colour, mark and words for how a sample ended
    Status.CONVERGED: (GREEN, "o", ""),
    Status.EXHAUSTED: (ORANGE, "s", ", out of budget"),
    Status.NONFINITE: (RED, "X", ", inf or NaN"),
}
FEW = 8
"""Up to so many samples, each has a line of its own."""


def contraction_rate(solution: Solution | Stats, *, tail: int = 5) -> Tensor:
    """The factor by which the residual of each sample fell per step, over the last `tail` steps it took.

    (r_s / r_{s-t})^(1/t), with r_k = ‖f(z_k) - z_k‖ after k steps, s the last of them and t = min(tail, s): a geometric
    mean. Below 1 the residual fell. For `Picard(damping=β)` it tends to the spectral radius of (1 - β) I + β J at the fixed
    point; a solver that accelerates stays below that.

    Args:
        solution: of a solve with `Stopping(trace=True)`, or its stats.
        tail: steps to look at. Early steps tell of the way to the fixed point, late ones of its neighbourhood.

    Returns:
        (B,); NaN for a sample that took no step.

    >>> import torch
    >>> from equilibria import Picard, Stopping, fixed_point
    >>> stopping = Stopping(rtol=1e-4, trace=True)
    >>> solution = fixed_point(lambda z: 0.5 * z + 1, torch.zeros(1, 1), solver=Picard(), stopping=stopping)
    >>> round(float(contraction_rate(solution)), 4)
    0.5
    """
    check_count("contraction_rate", "tail", tail, 1)
    stats, trace = _traced(solution)
    last = stats.steps - (stats.status == Status.NONFINITE).long()  # the step at which it failed has no residual
    span = last.clamp(max=tail)
    end, begin = (trace.gather(0, k.clamp(min=0).unsqueeze(0)).squeeze(0) for k in (last, last - span))
    rate = (end / begin) ** (1.0 / span.to(trace.dtype))
    return torch.where(last > 0, rate, float("nan"))


def plot_convergence(
    solution: Solution | Stats,
    ax: Axes | None = None,
    *,
    stopping: Stopping | None = None,
    worst: int = 3,
    quantiles: tuple[float, float] = (0.1, 0.9),
) -> Axes:
    """Draw ‖f(z) - z‖ against solver steps, on a logarithmic scale.

    Up to eight samples are drawn one by one; of more, the median, the band between two quantiles, and the samples that
    ended with the largest residual. A mark at the end of a line says how that sample ended: a circle, converged; a square,
    out of budget; a cross, inf or NaN.

    Args:
        solution: of a solve with `Stopping(trace=True)`, or its stats.
        ax: matplotlib axes to draw into; if not given, those of a new figure, outside of pyplot, which
            `ax.figure.savefig("convergence.png")` saves.
        stopping: of the solve; draws the tolerance (the median over samples) and, where a step is one evaluation, the
            budget.
        worst: how many of the samples with the largest final residual to draw, of more than eight.
        quantiles: of the band.

    Returns:
        The axes.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the solve kept no trace.

    >>> import torch
    >>> from equilibria import Stopping, fixed_point
    >>> stopping = Stopping(trace=True)
    >>> solution = fixed_point(torch.cos, torch.randn(100, 1), stopping=stopping)
    >>> plot_convergence(solution, stopping=stopping).get_xlabel()
    'solver step'
    """
    stats, trace = _traced(solution)
    check_count("plot_convergence", "worst", worst, 0)
    low, high = quantiles
    if not 0.0 <= low <= high <= 1.0:
        raise ValueError(f"plot_convergence(quantiles={quantiles}): give two numbers with 0 <= low <= high <= 1")
    own = ax is None
    ax = _new_axes() if ax is None else ax
    values = trace.detach().double().cpu()
    values = torch.where((values > 0) & (values < 1e250), values, float("nan"))  # what a logarithmic axis can show
    batch = values.shape[1]
    if batch <= FEW:
        _draw_samples(ax, stats, values, range(batch))
    else:
        steps = range(len(values))
        band = values.nanquantile(torch.tensor([low, 0.5, high], dtype=values.dtype), dim=1)  # (3, 1 + steps)
        label = f"{low:.0%} to {high:.0%} of {batch} samples"
        ax.fill_between(steps, band[0].tolist(), band[2].tolist(), color=BLUE, alpha=0.2, linewidth=0, label=label)
        ax.plot(steps, band[1].tolist(), color=BLUE, linewidth=2.0, label="median")
        order = torch.nan_to_num(stats.residual.detach().double().cpu(), nan=float("inf")).argsort(descending=True)
        _draw_samples(ax, stats, values, order[:worst].tolist())
    if stopping is not None:
        _draw_limits(ax, stats, stopping, len(trace) - 1)
    _label(ax, stats)
    ax.legend(fontsize=8, frameon=False, **({"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)} if own else {}))
    return ax


def _traced(solution: Solution | Stats) -> tuple[Stats, Tensor]:
    """The stats and their trace (1 + steps, B)."""
    stats = solution.stats if isinstance(solution, Solution) else solution
    if not isinstance(stats, Stats):
        raise TypeError(f"got a {type(stats).__name__}; give the Solution of a solve, or its Stats")
    if stats.trace is None:
        raise ValueError("the solve kept no trace of its residuals; solve with Stopping(trace=True)")
    return stats, stats.trace


def _new_axes() -> Axes:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot_convergence needs matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(8.0, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    return figure.add_subplot()


def _draw_samples(ax: Any, stats: Stats, values: Tensor, samples: Sequence[int]) -> None:
    """A line for each of these samples up to its last step, and a mark there that says how it ended."""
    lines = ("-", "--", "-.", ":")
    for i, sample in enumerate(samples):
        last = int(stats.steps[sample])
        line = values[: last + 1, sample]
        colour, mark, words = ENDS[Status(int(stats.status[sample]))]
        ends = int((~line.isnan()).nonzero()[-1]) if bool((~line.isnan()).any()) else 0
        ax.plot(
            range(len(line)), line.tolist(), color=colour, linestyle=lines[i // 2 % 4], alpha=0.9 if i % 2 == 0 else 0.5,
            linewidth=1.2, marker=mark, markevery=[ends], markersize=6, label=f"sample {sample}{words}",
        )  # fmt: skip


def _draw_limits(ax: Any, stats: Stats, stopping: Stopping, steps: int) -> None:
    scale = torch.where(stats.relative > 0, stats.residual / stats.relative, 0.0)  # ‖f(z)‖
    tolerance = float(stopping.tolerance(scale.detach().double()).nanmedian())
    if tolerance > 0:
        ax.axhline(tolerance, color=GREY, linestyle="--", linewidth=1.0, label=f"tolerance (rtol {stopping.rtol:.0e})")
    if stats.evaluations == steps + 1:
        ax.axvline(stopping.max_evals - 1, color=GREY, linestyle=":", linewidth=1.0,
                   label=f"budget ({stopping.max_evals} evaluations)")  # fmt: skip


def _label(ax: Any, stats: Stats) -> None:
    from matplotlib.ticker import MaxNLocator

    ends = [int((stats.status == status).sum()) for status in Status]
    text = [f"{ends[0]} of {len(stats.status)} converged"]
    text += [f"{ends[1]} out of budget"] if ends[1] else []
    text += [f"{ends[2]} inf or NaN"] if ends[2] else []
    ax.set_title(f"{', '.join(text)}; evaluations: {stats.evaluations}", fontsize=11)
    ax.set_yscale("log")
    ax.set_xlabel("solver step")
    ax.set_xlim(left=-0.5)
    ax.set_ylabel("residual ‖f(z) - z‖")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.grid(visible=True, which="major", alpha=0.3)
