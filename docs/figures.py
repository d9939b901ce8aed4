"""Draw the figures of the concept pages, by the library itself on maps that are small enough to see.

    python docs/figures.py

It writes docs/figures/*.svg, each in one version for light and one for dark pages.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from equilibria import (
    Anderson,
    Broyden,
    Implicit,
    Neumann,
    NewtonKrylov,
    Phantom,
    Picard,
    Stopping,
    Unrolled,
    fixed_point,
)
from equilibria.diagnostics import plot_convergence, spectral_radius

FOLDER = Path(__file__).parent / "figures"
LIGHT = {"text": "#333344", "grid": "#d9d9e3", "cycle": ["#3f51b5", "#c2410c", "#15803d", "#a21caf", "#64748b"]}
DARK = {"text": "#d5d7e2", "grid": "#464a5c", "cycle": ["#93a0f5", "#fb923c", "#4ade80", "#e879f9", "#94a3b8"]}
TIGHT = Stopping(rtol=1e-10, atol=0.0, max_evals=400)


def orthogonal(size: int, scale: float) -> Tensor:
    return scale * torch.linalg.qr(torch.randn(size, size))[0]


def cobweb(figure: Figure) -> None:
    """Plain iteration on a line: where the slope at the crossing is below 1 it spirals in, where it is above, out."""
    axes: Any = figure.subplots(1, 2, sharey=True)
    line = torch.linspace(-0.2, 1.6, 200)
    for ax, steepness, title in zip(axes, (0.7, 1.6), ("slope −0.7: converges", "slope −1.6: does not"), strict=True):

        def f(z: Tensor, steepness: float = steepness) -> Tensor:
            return 0.7 - torch.tanh(steepness * (z - 0.7))

        ax.plot(line, f(line), label="f(z)")
        ax.plot(line, line, color="C4", linewidth=1, label="z")
        z = torch.tensor(0.2 if steepness < 1 else 0.62)
        path = [(z, z)]
        for _ in range(12):
            path += [(z, f(z)), (f(z), f(z))]
            z = f(z)
        ax.plot(*zip(*path, strict=True), color="C1", linewidth=1, label="z ← f(z)")
        found = fixed_point(f, torch.zeros(1, 1), stopping=TIGHT).z
        ax.plot(found.item(), found.item(), "o", color="C2", label="fixed point, by Anderson()")
        ax.set(title=title, xlabel="z", xlim=(-0.2, 1.6), ylim=(-0.2, 1.6))
    axes[0].legend(loc="lower left", fontsize=8)


def depth(figure: Figure) -> None:
    """A stack of equal layers runs into the equilibrium: its output by depth, three features of one sample."""
    ax = figure.subplots()
    W, x = orthogonal(32, 0.9), torch.randn(1, 32)
    z, _ = fixed_point(lambda z: torch.tanh(z @ W + x), torch.zeros(1, 32), stopping=TIGHT)
    state, layers = torch.zeros(1, 32), [torch.zeros(1, 32)]
    for _ in range(24):
        state = torch.tanh(state @ W + x)
        layers.append(state)
    for i in range(4):
        ax.plot(torch.cat(layers)[:, i], marker=".", color=f"C{i}")
        ax.axhline(float(z[0, i]), color=f"C{i}", linestyle=":", linewidth=1.2)
    ax.set(xlabel="layers of the stack (the same one each time)", ylabel="four features of its output")


def convergence(figure: Figure) -> None:
    """Residuals of four solvers on one map with a spectral radius of about 0.9, drawn by plot_convergence."""
    axes: Any = figure.subplots(2, 2, sharex=True, sharey=True)
    W, x = orthogonal(64, 1.2), torch.randn(32, 64)
    stopping = Stopping(rtol=1e-5, max_evals=80, trace=True)
    for ax, solver in zip(axes.flat, (Picard(), Anderson(), Broyden(), NewtonKrylov()), strict=True):
        solution = fixed_point(lambda z: torch.tanh(z @ W + x), torch.zeros(32, 64), solver=solver, stopping=stopping)
        plot_convergence(solution, ax, stopping=stopping, worst=1)
        ax.set_title(f"{type(solver).__name__}: {solution.stats.evaluations} evaluations", fontsize=10)
        ax.label_outer()
        if ax is not axes[0, 0] and ax.get_legend():
            ax.get_legend().remove()


def radius(figure: Figure) -> None:
    """What a spectral radius near one costs: evaluations to a relative residual of 1e-4 by the radius."""
    ax = figure.subplots()
    x, W = torch.randn(32, 64), orthogonal(64, 1.0)
    solvers = {"Picard()": Picard(), "Anderson()": Anderson(), "Broyden()": Broyden()}
    found: dict[str, list[tuple[float, int]]] = {name: [] for name in solvers}
    stopping = Stopping(rtol=1e-4, max_evals=400)
    for scale in torch.linspace(0.5, 1.5, 11):

        def f(z: Tensor, V: Tensor = scale * W) -> Tensor:
            return torch.tanh(z @ V + x)

        rho = None
        for name, solver in solvers.items():
            z, stats = fixed_point(f, torch.zeros(32, 64), solver=solver, stopping=stopping)
            rho = float(spectral_radius(f, z).radius.max()) if name == "Anderson()" or rho is None else rho
            if bool(stats.converged.all()):
                found[name].append((rho, stats.evaluations))
    for name, points in found.items():
        ax.semilogy(*zip(*points, strict=True), marker=".", label=name)
    ax.axvline(1.0, color="C4", linewidth=1, linestyle=":")
    ax.set(xlabel="spectral radius of ∂f/∂z, largest of 32 samples", ylabel="evaluations of f")
    ax.legend()


def gradients(figure: Figure) -> None:
    """Error of the gradient by what the backward pass costs, for a radius of about 0.9."""
    ax = figure.subplots()
    torch.set_default_dtype(torch.float64)
    W, x, w = orthogonal(64, 1.1), torch.randn(16, 64), torch.randn(16, 64)

    def gradient(adjoint: Any, **options: Any) -> Tensor:
        a = x.clone().requires_grad_()
        z, _ = fixed_point(
            lambda z, W, a: torch.tanh(z @ W + a), torch.zeros(16, 64), W, a, stopping=TIGHT, adjoint=adjoint, **options
        )
        return torch.autograd.grad((z * w).sum(), a)[0]

    exact = gradient(Implicit(stopping=TIGHT))
    counts = [1, 2, 3, 5, 8, 12, 16, 20, 25, 30, 40]
    ways: dict[str, Callable[[int], Any]] = {
        "Implicit(max_evals=n)": lambda n: Implicit(stopping=Stopping(rtol=0.0, max_evals=n)),
        "Neumann(terms=n), the same as Phantom(steps=n)": lambda n: Neumann(terms=n),
    }
    for name, make in ways.items():
        errors = [float((gradient(make(n)) - exact).norm() / exact.norm()) for n in counts]
        ax.semilogy(counts, errors, marker=".", label=name)
    one = float((gradient(Phantom()) - exact).norm() / exact.norm())
    ax.semilogy([1], [one], "o", color="C2", label="Phantom(): Jacobian-free")
    ax.set(xlabel="products with the Jacobian, n", ylabel="relative error of ∂loss/∂x")
    ax.legend()
    torch.set_default_dtype(torch.float32)


def memory(figure: Figure) -> None:
    """Numbers that autograd holds between the passes, by the evaluations that the solve was given."""
    ax = figure.subplots()
    W, x = orthogonal(64, 0.9).requires_grad_(), torch.randn(16, 64)
    budgets = [4, 8, 16, 32, 64]
    ways = {"Unrolled()": Unrolled(), "Phantom(steps=5)": Phantom(steps=5), "Implicit()": Implicit()}
    for name, adjoint in ways.items():
        held = []
        for budget in budgets:
            seen: dict[int, int] = {}

            def pack(tensor: Tensor, seen: dict[int, int] = seen) -> Tensor:
                seen[tensor.data_ptr()] = tensor.numel()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                fixed_point(
                    lambda z, W, x: torch.tanh(z @ W + x), torch.zeros(16, 64), W, x, solver=Picard(), adjoint=adjoint,
                    stopping=Stopping(rtol=0.0, max_evals=budget),
                )  # fmt: skip
            held.append(sum(seen.values()) / x.numel())
        ax.plot(budgets, held, marker=".", label=name)
    ax.set(xlabel="evaluations of f in the forward solve", ylabel="tensors held for backward, in states")
    ax.set_xticks(budgets)
    ax.legend()


FIGURES: dict[str, tuple[Callable[[Figure], None], tuple[float, float]]] = {
    "cobweb": (cobweb, (8, 3.8)),
    "depth": (depth, (7, 3.4)),
    "convergence": (convergence, (8, 5.6)),
    "radius": (radius, (7, 3.8)),
    "gradients": (gradients, (7, 3.8)),
    "memory": (memory, (7, 3.6)),
}


def style(colours: dict[str, Any]) -> dict[str, Any]:
    text, grid = colours["text"], colours["grid"]
    return {
        "axes.prop_cycle": cycler(color=colours["cycle"]),
        "axes.edgecolor": grid, "axes.labelcolor": text, "axes.titlecolor": text, "text.color": text,
        "xtick.color": text, "ytick.color": text, "axes.grid": True, "grid.color": grid, "grid.linewidth": 0.5,
        "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 11, "axes.facecolor": "none",
        "figure.facecolor": "none", "legend.frameon": False, "legend.labelcolor": text, "lines.linewidth": 1.6,
        "font.family": ["DejaVu Sans", "sans-serif"], "font.size": 9.5, "svg.fonttype": "none",
        "svg.hashsalt": "equilibria",
    }  # fmt: skip


def draw(name: str, folder: Path = FOLDER) -> list[Path]:
    """Both versions of one figure."""
    make, size = FIGURES[name]
    folder.mkdir(exist_ok=True)
    paths = []
    for suffix, colours in (("", LIGHT), ("-dark", DARK)):
        torch.manual_seed(3)
        with mpl.rc_context(style(colours)):  # pyright: ignore[reportArgumentType]
            figure = Figure(figsize=size, layout="constrained")
            make(figure)
            for ax in figure.axes:
                assert isinstance(ax, Axes)
                ax.set_axisbelow(True)
            paths.append(folder / f"{name}{suffix}.svg")
            figure.savefig(paths[-1], metadata={"Date": None})
    return paths


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in FIGURES:
        print(*(f"{path.name} {path.stat().st_size / 1000:.0f} kB" for path in draw(name)))
