"""The curves of one run or several, and how their solves converge."""

from __future__ import annotations

from collections.abc import Sequence

from equilibria.train.html.drawing import INK, MUTED, RUN, SHADE, SHADES, Drawing
from equilibria.train.html.reading import RunView


def curves(runs: Sequence[RunView]) -> list[Drawing]:
    """The figures over optimizer steps, without those that would be empty."""
    bits = any(run.last("valid/bits_per_byte") for run in runs)
    drawings = [
        _loss(runs),
        _coded(runs, "valid/bits_per_byte", "Bits per byte", "validation, bits per UTF-8 byte") if bits
        else _coded(runs, "valid/perplexity", "Perplexity", "validation, per token"),
        _evaluations(runs),
        _residuals(runs),
        _unconverged(runs),
        _gradient(runs),
        _plain(runs, "train/learning_rate", "Learning rate", "of the next step"),
        _plain(runs, "train/tokens_per_second", "Speed", "tokens per second of training", bottom=0.0),
        _memory(runs),
    ]  # fmt: skip
    drawings = [drawing for drawing in drawings if not drawing.empty]
    end = max((model.step for _, model, _, _ in _models(runs)), default=0)
    for drawing in drawings:  # one axis for all, so that one can look from figure to figure
        drawing.axes.set_xlim(0, 1.02 * max(end, 1))
    return drawings


def convergence(run: RunView) -> Drawing | None:
    """Residual by residual, a solve at several moments of training; None where none was traced."""
    traces = [trace for trace in run.traces if len(trace.get("median", ())) > 1]
    if not traces:
        return None
    count = min(len(traces), SHADES)
    chosen = [traces[round(index * (len(traces) - 1) / max(count - 1, 1))] for index in range(count)]
    each_one = all(trace.get("evaluations") == len(trace["median"]) for trace in chosen)
    drawing = Drawing(run.name, "relative residual over " + ("evaluations of f" if each_one else "solver steps"), log=True)
    for index, trace in enumerate(chosen):
        steps = range(1, len(trace["median"]) + 1) if each_one else range(len(trace["median"]))
        shade = SHADE[SHADES - count + index]
        last = index == count - 1
        drawing.line(steps, trace["median"], shade, f"step {trace['step']:,}", width=2.0 if last else 1.5, dots=True)
        if last:
            drawing.line(steps, trace["worst"], shade, "worst sample of the last", dash=":", width=1.2)
    rtol = run.get("solver.eval_rtol")
    rtol = run.get("solver.rtol", 0.0) if rtol is None else rtol
    drawing.level(rtol, f"tolerance {rtol:g}")
    return drawing


def _loss(runs: Sequence[RunView]) -> Drawing:
    drawing = Drawing("Loss", "nats per token")
    for colour, model, label, dash in _models(runs):
        one = len(runs) == 1
        prefix = f"{label}, " if label else ""
        drawing.line(*model.series("train/loss"), colour, f"{prefix}training", dash=dash, width=0.9,
                     key_colour=colour if one else INK)  # fmt: skip
        drawing.line(*model.series("valid/loss"), colour, f"{prefix}validation", dash=dash, dots=True,
                     key_colour=colour if one else INK)  # fmt: skip
    if not drawing.empty:
        drawing.bound()
    return drawing


def _coded(runs: Sequence[RunView], key: str, title: str, unit: str) -> Drawing:
    drawing = Drawing(title, unit)
    for colour, model, label, dash in _models(runs):
        drawing.line(*model.series(key), colour, label, dash=dash, dots=True, key_colour=_key_colour(runs, colour))
    xz = {run.summary.get("xz_bits_per_byte") or 0.0 for run in runs} - {0.0}
    if key.endswith("bits_per_byte") and len(xz) == 1 and not drawing.empty:
        level = xz.pop()
        drawing.level(level, f"xz -9 on the test text ({level:.3f})")
    if not drawing.empty:
        drawing.bound()
    return drawing


def _evaluations(runs: Sequence[RunView]) -> Drawing:
    drawing = Drawing("Cost of a solve", "evaluations of f per solve")
    budgets: dict[int, str] = {}
    for index, run in enumerate(runs):
        _solves(drawing, runs, index, "evaluations")
        drawing.line(*run.series("valid/evaluations"), _colour(index), "forward, validation", dots=True, width=0.0,
                     key_colour=_key_colour(runs, _colour(index)))  # fmt: skip
        if run.last("forward/evaluations") is not None and run.get("solver.max_evals"):
            budget = run.get("solver.max_evals")
            budgets[budget] = MUTED if len(runs) == 1 or budget in budgets else _colour(index)
    if not drawing.empty:
        for budget, colour in budgets.items():
            drawing.level(budget, f"budget in training ({budget})", colour)
        if len(runs) == 1 and runs[0].twin is not None:
            depth = runs[0].get("twin_depth", 0)
            drawing.level(depth, f"blocks of the twin ({depth})", RUN[1])
        drawing.axes.set_ylim(bottom=0)
    return drawing


def _residuals(runs: Sequence[RunView]) -> Drawing:
    drawing = Drawing("Residual", "relative, ‖f(z) − z‖ / ‖f(z)‖", log=True)
    tolerances: dict[float, str] = {}
    for index, run in enumerate(runs):
        _solves(drawing, runs, index, "residual")
        drawing.line(*run.series("valid/residual"), _colour(index), "forward, validation", dots=True, width=0.0,
                     key_colour=_key_colour(runs, _colour(index)))  # fmt: skip
        rtol = run.get("solver.rtol", 0.0)
        tolerances[rtol] = MUTED if len(runs) == 1 or rtol in tolerances else _colour(index)
    if not drawing.empty:
        for rtol, colour in tolerances.items():
            drawing.level(rtol, f"tolerance in training ({rtol:g})", colour)
    return drawing


def _unconverged(runs: Sequence[RunView]) -> Drawing:
    drawing = Drawing("Not converged", "per cent of the samples of training, above the tolerance")
    for index in range(len(runs)):
        _solves(drawing, runs, index, "unconverged", scale=100.0)
    drawing.axes.set_ylim(-3, 103)
    return drawing


def _gradient(runs: Sequence[RunView]) -> Drawing:
    drawing = Drawing("Gradient", "norm before clipping", log=True)
    for colour, model, label, dash in _models(runs):
        drawing.line(*model.series("train/gradient_norm"), colour, label, dash=dash, key_colour=_key_colour(runs, colour))
    clip = {run.get("optim.clip") for run in runs} - {None}
    if len(clip) == 1 and not drawing.empty:
        level = clip.pop()
        drawing.level(level, f"clip ({level:g})")
    return drawing


def _plain(runs: Sequence[RunView], key: str, title: str, unit: str, *, bottom: float | None = None,
           scale: float = 1.0) -> Drawing:  # fmt: skip
    drawing = Drawing(title, unit)
    for colour, model, label, dash in _models(runs):
        steps, values = model.series(key)
        drawing.line(steps, [scale * value for value in values], colour, label, dash=dash,
                     key_colour=_key_colour(runs, colour))  # fmt: skip
    if bottom is not None and not drawing.empty:
        drawing.axes.set_ylim(bottom=bottom)
    return drawing


def _memory(runs: Sequence[RunView]) -> Drawing:
    most = max((value for _, model, _, _ in _models(runs) for value in model.series("train/memory_bytes")[1]), default=0)
    unit, size = ("GiB", 2.0**30) if most > 4 * 2**30 else ("MiB", 2.0**20)
    return _plain(runs, "train/memory_bytes", "Memory", f"{unit} at the peak so far", bottom=0.0, scale=1 / size)


def _solves(drawing: Drawing, runs: Sequence[RunView], index: int, what: str, *, scale: float = 1.0) -> None:
    """The lines of forward and backward solves of one run."""
    one = len(runs) == 1
    for name, dash, width in (("forward", "-", 1.6), ("backward", "-.", 1.2)):
        colour = RUN[2] if one and name == "backward" else _colour(index)
        steps, values = runs[index].series(f"{name}/{what}")
        drawing.line(steps, [scale * value for value in values], colour, name, dash=dash, width=width,
                     key_colour=_key_colour(runs, colour))  # fmt: skip


def _models(runs: Sequence[RunView]) -> list[tuple[str, RunView, str, str]]:
    """Colour, model, what the key says of it, and dash, of each run and its twin. The names of several runs stand above."""
    models = []
    for index, run in enumerate(runs):
        one = len(runs) == 1
        own = ("stack" if run.is_stack else "DEQ") if one and run.twin is not None else ""
        models.append((_colour(index), run, own, "-"))
        if run.twin is not None:
            models.append((RUN[1] if one else _colour(index), run.twin, "explicit twin", "--"))
    return models


def _colour(index: int) -> str:
    return RUN[index % len(RUN)]


def _key_colour(runs: Sequence[RunView], colour: str) -> str:
    return colour if len(runs) == 1 else INK
