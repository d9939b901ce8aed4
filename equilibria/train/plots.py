"""The plots of a run, as PNG files.

Figures are drawn with matplotlib's object interface on an Agg canvas: no display, no global state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

BLUE, ORANGE, GREEN, GREY = "#1f5fa8", "#d9731a", "#2f8f5b", "#8a8a8a"
COLOURS = {"anderson": BLUE, "broyden": GREEN, "picard": ORANGE}

Rows = Sequence[Mapping[str, Any]]


def plot_loss(path: Path, rows: Rows, twin_rows: Rows = ()) -> None:
    """Training and validation loss against steps, in nats per token, of the model and of its twin if there is one."""
    figure, axes = _figure("Loss", "optimizer step", "nats per token")
    for label, colour, source in (("DEQ", BLUE, rows), ("explicit twin", ORANGE, twin_rows)):
        steps, losses = _series(source, "train/loss")
        if steps:
            axes.plot(steps, losses, color=colour, alpha=0.35, linewidth=1.0, label=f"{label}, training")
        steps, losses = _series(source, "valid/loss")
        if steps:
            axes.plot(steps, losses, color=colour, marker="o", markersize=4, label=f"{label}, validation")
    _save(figure, axes, path)


def plot_evaluations(path: Path, rows: Rows, *, budget: int, twin_depth: int | None = None) -> None:
    """Evaluations of f per solve over training, forward and backward, with the budget of the forward solve."""
    figure, axes = _figure("Cost of a solve", "optimizer step", "evaluations of f per solve")
    for key, label, colour in (("forward", "forward", BLUE), ("backward", "backward", GREEN)):
        steps, values = _series(rows, f"{key}/evaluations")
        if steps:
            axes.plot(steps, values, color=colour, label=label)
    steps, values = _series(rows, "valid/evaluations")
    if steps:
        axes.plot(steps, values, color=BLUE, linestyle="none", marker="o", markersize=4, label="forward, validation")
    axes.axhline(budget, color=GREY, linestyle=":", label=f"budget in training ({budget})")
    if twin_depth is not None and twin_depth != budget:
        axes.axhline(twin_depth, color=ORANGE, linestyle="--", label=f"blocks of the explicit twin ({twin_depth})")
    axes.set_ylim(bottom=0)
    _save(figure, axes, path)


def plot_residual(path: Path, traces: Mapping[str, Tensor], *, chosen: str, rtol: float) -> None:
    """Residual against solver step on one batch, for each method: the median over samples, the range for `chosen`.

    The line at `rtol` shows where a solve of evaluation ends; 0, as where the test is absolute, draws none.

    `traces` maps the name of a method to ‖f(z) - z‖ / ‖f(z*)‖ (steps, B), the first row at the start of the solve.
    """
    figure, axes = _figure("Residual of a solve on validation text", "solver step", "‖f(z) - z‖ / ‖f(z*)‖")
    axes.set_yscale("log")
    for method, trace in sorted(traces.items(), key=lambda item: item[0] == chosen):  # the chosen one on top
        values = trace.detach().double().cpu().clamp_min(1e-12)  # (steps, B)
        steps = range(len(values))
        is_chosen = method == chosen
        axes.plot(
            steps,
            values.median(dim=1).values.numpy(),
            color=COLOURS.get(method, GREY),
            linewidth=2.2 if is_chosen else 1.2,
            linestyle="-" if is_chosen else "--",
            marker="o" if is_chosen else None,
            markersize=3.5,
            label=f"{method}, median" + (" (used in this run)" if is_chosen else ""),
        )
        if is_chosen:
            low, high = values.amin(dim=1).numpy(), values.amax(dim=1).numpy()
            axes.fill_between(steps, low, high, color=COLOURS.get(method, GREY), alpha=0.15, linewidth=0)
    if rtol:
        axes.axhline(rtol, color=GREY, linestyle=":", label=f"tolerance ({rtol:g})")
    _save(figure, axes, path)


def _series(rows: Rows, key: str) -> tuple[list[int], list[float]]:
    points = [(row["step"], row[key]) for row in rows if key in row]
    return [step for step, _ in points], [value for _, value in points]


def _figure(title: str, x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7.2, 4.6), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=12)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(True, which="major", color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Figure, axes: Axes, path: Path) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    labels = axes.get_legend_handles_labels()[1]
    if labels:
        figure.legend(loc="outside lower center", ncols=2 if len(labels) == 4 else 3, frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
