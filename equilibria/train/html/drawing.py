"""Figures as SVG that takes its colours from the page, so that one figure serves in light, in dark and on paper.

matplotlib knows no style sheets. Each colour of the page is drawn as a value that stands for it, and the finished SVG has
the name of the page's variable in its place. The key to the lines stands in the page too, where it can wrap.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

RUNS = 8
"""Colours of runs."""
SHADES = 6
"""Colours of moments in a run, from early to late."""
INK, MUTED, GRID = "#fd0001", "#fd0002", "#fd0003"
RUN = tuple(f"#fe000{index}" for index in range(RUNS))
SHADE = tuple(f"#fc000{index}" for index in range(SHADES))
VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid"}
VARIABLES |= {colour: f"run{index}" for index, colour in enumerate(RUN)}
VARIABLES |= {colour: f"shade{index}" for index, colour in enumerate(SHADE)}
MOST_POINTS = 400
"""Points of a line; of more, each is the mean of several, and a band shows their range."""
DASHES = {"-": "", "--": "5 3", ":": "1.5 2.5", "-.": "6 2 1.5 2"}


@dataclass(frozen=True)
class Key:
    """An entry of the key to a figure."""

    label: str
    colour: str
    """CSS variable."""
    dash: str = ""
    line: bool = True
    dot: bool = False


@dataclass
class Drawing:
    """A figure in the making, and its key."""

    title: str
    unit: str
    log: bool = False
    note: str = ""
    keys: list[Key] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._figure = Figure(figsize=(5.4, 2.9), layout="constrained")
        FigureCanvasSVG(self._figure)
        self.axes: Axes = self._figure.add_subplot()
        self._values: list[float] = []

    @property
    def empty(self) -> bool:
        """Whether nothing was drawn."""
        return not self._values

    def line(self, x: Sequence[float], y: Sequence[float], colour: str, label: str = "", *, dash: str = "-",
             width: float = 1.6, dots: bool = False, key_colour: str | None = None) -> None:  # fmt: skip
        """A line, or a dot where there is one point."""
        points = [(a, b) for a, b in zip(x, y, strict=True) if not self.log or b > 0]
        if not points:
            return
        x, y, low, high = _thinned(points)
        if low is not None and high is not None:
            self.axes.fill_between(x, low, high, color=colour, alpha=0.16, linewidth=0)
        dot = dots or len(points) == 1
        self.axes.plot(x, y, color=colour, linestyle=dash, linewidth=width, marker="o" if dot else None, markersize=3.2,
                       solid_joinstyle="round")  # fmt: skip
        self._values += [value for _, value in points]
        self.key(label, key_colour or colour, dash=dash, line=width > 0, dot=dot)

    def level(self, y: float, label: str, colour: str = MUTED) -> None:
        """A horizontal line, drawn where the figure shows something else too."""
        if y > 0:
            self.axes.axhline(y, color=colour, linestyle=":", linewidth=1.1)
            self.key(label, colour, dash=":")

    def key(self, label: str, colour: str, *, dash: str = "-", line: bool = True, dot: bool = False) -> None:
        """An entry of the key, once."""
        if label and all(key.label != label for key in self.keys):
            self.keys.append(Key(label, VARIABLES[colour], DASHES[dash], line, dot))

    def bound(self) -> None:
        """Let no outburst of a diverging run flatten the rest."""
        values = sorted(self._values)
        usual = values[len(values) // 2]
        if values[-1] > 4 * max(usual, 1e-12) and not self.log:
            self.axes.set_ylim(top=4 * usual)
            self.note = "higher values are cut off"

    def svg(self, name: str) -> str:
        """The figure as an SVG element; `name` keeps its ids apart from those of other figures."""
        self._dress()
        text = io.StringIO()
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "equilibria"}):
            self._figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        svg = text.getvalue()
        svg = svg[svg.index("<svg") :]
        svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
        svg = re.sub(r'(<svg [^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg [^>]*?) height="[^"]*"', r"\1", svg))
        svg = re.sub(r'\bid="', f'id="{name}-', svg)
        svg = re.sub(r'(url\(#|xlink:href="#)', rf"\1{name}-", svg)
        svg = svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(self.title)}" ', 1)
        return re.sub(r"#f[cde]000\d", lambda found: f"var(--{VARIABLES[found.group()]})", svg)

    def _dress(self) -> None:
        axes = self.axes
        axes.grid(True, which="major", color=GRID, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(MUTED)
        axes.tick_params(colors=MUTED, labelsize=8.5, length=0, which="both")
        axes.tick_params(axis="x", length=3)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        if self.log:
            axes.set_yscale("log")
            low, high = axes.get_ylim()
            few = high / low < 100
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if few else (1.0,), numticks=9))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0e}" if value < 1e-3 else f"{value:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        else:
            axes.yaxis.set_major_locator(MaxNLocator(nbins=6))
            axes.yaxis.set_major_formatter(FuncFormatter(_number))


def _number(value: float, _: int) -> str:
    if value and abs(value) < 1e-2:
        return f"{value:.2g}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}"


def _thinned(
    points: Sequence[tuple[float, float]],
) -> tuple[list[float], list[float], list[float] | None, list[float] | None]:
    """x, y, and the range of the points that each stands for, if it stands for several."""
    size = -(-len(points) // MOST_POINTS)
    if size == 1:
        return [x for x, _ in points], [y for _, y in points], None, None
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    values = [[y for _, y in group] for group in groups]
    middle = [sum(x for x, _ in group) / len(group) for group in groups]
    return (
        middle,
        [sum(each) / len(each) for each in values],
        [min(each) for each in values],
        [max(each) for each in values],
    )
