"""What a layer's equilibrium is like, in numbers and in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from equilibria.adjoints import Adjoint, Forward, Implicit
from equilibria.adjoints.adjoint import DeclaredFunction
from equilibria.diagnostics.conditioning import Conditioning, condition_of
from equilibria.diagnostics.convergence import contraction_rate
from equilibria.diagnostics.linear import Linearised
from equilibria.diagnostics.spectral_radius import SpectralRadius, radius_of
from equilibria.fixed_point import fixed_point
from equilibria.iterate import Solved
from equilibria.solution import NonFiniteError, Stats, Status
from equilibria.solvers import Solver
from equilibria.stopping import Stopping

SLOW = 0.95
"""Spectral radius from which on plain iteration counts as slow: a digit takes 45 steps."""
SINGULAR = 1e4
"""Condition from which on a backward solve to 1e-4, the default, may leave a gradient that is wrong altogether."""
HASTY = 3
"""Evaluations within which a solve to a loose tolerance may have stopped before it began."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What `summary` found, for each of B samples; `str` makes a page of it."""

    stopping: Stopping
    stats: Stats
    """Of the forward solve, with its trace."""
    backward: Stats | None
    """Of a backward solve for a random gradient; None where the adjoint runs none, or f has no tensors to differentiate."""
    backward_failed: bool
    """Whether the backward solve became inf or NaN."""
    rate: Tensor
    """(B,) observed over the last steps, see `contraction_rate`."""
    radius: SpectralRadius
    conditioning: Conditioning

    @property
    def converged(self) -> float:
        """The share of samples that met the tolerance."""
        return float(self.stats.converged.double().mean())

    @property
    def advice(self) -> tuple[str, ...]:
        """What stands out, and what to do about it; empty where nothing does."""
        return tuple(text for rule in RULES if (text := rule(self)) is not None)

    def __str__(self) -> str:
        stats, backward = self.stats, self.backward
        cost = f"{stats.evaluations} forward"
        cost += f", {backward.evaluations} backward" if backward is not None else ""
        batch = len(stats.status)
        about = "" if bool(self.radius.converged.all()) else " (not settled: about)"
        at_least = "" if bool(self.conditioning.converged.all()) else " (not settled: at least)"
        rows = [
            ("converged", f"{int(stats.converged.sum())} of {batch} samples"),
            ("evaluations", cost),
            ("relative residual", _spread(stats.relative, "{:.1e}")),
            ("contraction rate", _spread(self.rate, "{:.3f}")),
            ("spectral radius", _spread(self.radius.radius, "{:.3f}") + about),
            ("condition of I - J", _spread(self.conditioning.condition, "{:.2g}") + at_least),
        ]
        lines = [f"{name:<20}{text}" for name, text in rows]
        return "\n".join([*lines, *(f"- {text}" for text in self.advice or ("nothing stands out",))])


def summary(
    layer: Any,
    *inputs: Any,
    solver: Solver[Any] | None = None,
    stopping: Stopping | None = None,
    adjoint: Adjoint | None = None,
    batch_dims: Sequence[int | None] | None = None,
) -> Summary:
    """Solve once, look at J = ∂f/∂z where the solve ended, run a backward pass, and say what stands out.

    Costs the solve, the backward pass for a random gradient, and up to 280 products with J, for which vectors as large as
    80 states are held. Gradients and the random state are left alone.

    Args:
        layer: a `DEQ`, called as layer(*inputs) and solved as it is set up; or a map f, then given as
            summary(f, z0, *args, ...).
        inputs: those of the layer; or z0 and the other arguments of f.
        solver, stopping, adjoint, batch_dims: for a map f, as for `fixed_point`; a DEQ has its own.

    Raises:
        TypeError: options were given for a layer that has its own.

    >>> import torch
    >>> found = summary(lambda z, x: 1.3 * torch.sin(z + x), torch.zeros(1, 1), torch.zeros(1, 1))
    >>> round(float(found.radius.radius), 2)
    1.3
    >>> print(found.advice[0][:21])
    f is expansive here (
    """
    options = {"solver": solver, "stopping": stopping, "adjoint": adjoint, "batch_dims": batch_dims}
    if isinstance(layer, nn.Module) and all(hasattr(layer, name) for name in ("solver", "stopping", "adjoint")):
        given = [name for name, value in options.items() if value is not None]
        if given:
            raise TypeError(f"summary(..., {given[0]}=...): {type(layer).__name__} has its own {given[0]}; leave it out")
        probe: Any = object.__new__(type(layer))  # shares everything with the layer but the adjoint
        vars(probe).update(vars(layer))
        probe.adjoint = look = _Look(probe.adjoint)
        probe(*inputs)
    else:
        look = _Look(Implicit() if adjoint is None else adjoint)
        fixed_point(layer, *inputs, **{**options, "adjoint": look})
    return look.summary()


class _Look:
    """An adjoint that solves like another one, and keeps what was solved."""

    def __init__(self, adjoint: Adjoint) -> None:
        self.adjoint = adjoint

    def solve(self, f: DeclaredFunction, z0: Tensor, args: tuple[Tensor, ...], forward: Forward) -> Solved:
        self.f = f
        self.forward = Forward(forward.solver, replace(forward.stopping, trace=True), raise_nonfinite=False)
        self.args = tuple(arg.detach().requires_grad_(arg.is_floating_point()) for arg in args)
        with torch.enable_grad():
            self.solved = self.adjoint.solve(f, z0.detach(), self.args, self.forward)
        return Solved(*(value.detach() for value in self.solved))

    def summary(self) -> Summary:
        z = self.solved.z
        jacobian = Linearised(lambda z: self.f(z, *self.args), z)
        failed = not self._backward(jacobian.start(None).to(z.dtype))
        stats = self.forward.stats(Solved(*(value.detach() for value in self.solved)))
        return Summary(
            stopping=self.forward.stopping, stats=stats, backward=stats.backward[-1] if stats.backward else None,
            backward_failed=failed, rate=contraction_rate(stats), radius=radius_of(jacobian),
            conditioning=condition_of(jacobian),
        )  # fmt: skip

    def _backward(self, g: Tensor) -> bool:
        """Run the backward pass for the gradient g, which reports to the stats; False where it became inf or NaN."""
        wanted = [arg for arg in self.args if arg.requires_grad]
        if not wanted or not self.solved.z.requires_grad:
            return True
        try:
            torch.autograd.grad(self.solved.z, wanted, g, allow_unused=True)
        except NonFiniteError:
            return False
        return True


def _nonfinite(found: Summary) -> str | None:
    failed = found.stats.status == Status.NONFINITE
    if not bool(failed.any()):
        return None
    return (
        f"the solve became inf or NaN in {_of(failed)} (first: sample {int(failed.nonzero()[0])}): take damping below 1, "
        "Anderson() or Broyden(), smaller weights in f, or Jacobian regularisation"
    )


def _out_of_budget(found: Summary) -> str | None:
    spent = found.stats.status == Status.EXHAUSTED
    if not bool(spent.any()):
        return None
    stats, stopping = found.stats, found.stopping
    allowed = stopping.tolerance(stats.residual / stats.relative)
    missing = float((allowed[spent] / stats.residual[spent]).log().min())  # of the worst sample, at its rate below
    rate = float(torch.nan_to_num(found.rate[spent], nan=float("inf")).max())
    more = missing / math.log(rate) if 0 < rate < 1 else math.inf
    text = f"the budget of {stopping.max_evals} evaluations is spent by {float(spent.double().mean()):.0%} of samples: "
    if more <= 4 * stopping.max_evals:
        enough = stats.evaluations + math.ceil(more)
        return f"{text}raise max_evals (at the rate of the last steps, {rate:.2f}, to about {enough})"
    return (
        f"{text}at the rate of the last steps, {rate:.2f}, more evaluations alone will not do; try another solver or a "
        "longer history, a looser tolerance, or Jacobian regularisation"
    )


def _expansive(found: Summary) -> str | None:
    above = found.radius.radius >= 1
    if not bool(above.any()):
        return None
    return (
        f"f is expansive here (spectral radius {_worst(found.radius.radius):.2f}, at least 1 in {_of(above)}): Picard "
        "iteration would diverge; damping helps where the eigenvalues lie left of 1, Anderson() or Broyden() may converge "
        "without it, and Jacobian regularisation keeps the radius down in training"
    )


def _slow(found: Summary) -> str | None:
    radius = _worst(found.radius.radius)
    if not SLOW <= radius < 1:
        return None
    steps = math.ceil(-1 / math.log10(radius))
    return (
        f"f contracts slowly (spectral radius {radius:.3f}): plain iteration takes {steps} steps per digit; use Anderson() "
        "or Broyden(), or Jacobian regularisation in training"
    )


def _singular(found: Summary) -> str | None:
    condition = _worst(found.conditioning.condition)
    if not condition >= SINGULAR:
        return None
    return (
        f"the backward system is nearly singular (condition {condition:.0e}): gradients are unreliable, for an error in it "
        "is amplified by up to that much; lower the tolerance of the backward solve, or use Jacobian regularisation"
    )


def _backward_out_of_budget(found: Summary) -> str | None:
    if found.backward_failed:
        return "the backward solve became inf or NaN: use GMRES() for it, Jacobian regularisation, or Phantom()"
    if found.backward is None:
        return None
    spent = found.backward.status == Status.EXHAUSTED
    if not bool(spent.any()):
        return None
    return (
        f"the backward solve does not converge within {found.backward.evaluations} evaluations in {_of(spent)}: raise "
        "max_evals of Implicit(stopping=...), or use GMRES() with a longer restart for it"
    )


def _hasty(found: Summary) -> str | None:
    stats, rtol = found.stats, found.stopping.rtol
    loose = bool(stats.converged.all()) and rtol >= 1e-3 and bool((stats.relative > 0.01 * rtol).any())
    if not loose or stats.evaluations > HASTY:
        return None
    return (
        f"the solve converged in {stats.evaluations} evaluations at rtol {rtol:.0e}: the tolerance may be too loose for "
        "the gradient, which is that of the fixed point itself; see whether the loss changes at a tenth of it"
    )


RULES = (_nonfinite, _out_of_budget, _expansive, _slow, _singular, _backward_out_of_budget, _hasty)


def _of(samples: Tensor) -> str:
    return f"{int(samples.sum())} of {len(samples)} samples"


def _worst(values: Tensor) -> float:
    """The largest; NaN, of a sample without a value, does not count."""
    return float(torch.nan_to_num(values, nan=-math.inf, posinf=math.inf).max())


def _spread(values: Tensor, form: str) -> str:
    if not bool((~values.isnan()).any()):
        return "unknown"
    worst = form.format(_worst(values))
    return worst if len(values) == 1 else f"median {form.format(float(values.nanmedian()))}, worst {worst}"
