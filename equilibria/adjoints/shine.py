"""SHINE: what the forward solver learnt about I - J gives the backward solve its first guess."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from equilibria.adjoints.adjoint import DeclaredFunction, Forward
from equilibria.adjoints.implicit import Implicit
from equilibria.adjoints.implicit_function import LinearSystem, implicit, linear_run
from equilibria.iterate import Solved, iterate
from equilibria.solvers import GMRES, Solver
from equilibria.solvers.solver import InverseEstimate, State, check_choice, check_count
from equilibria.stopping import Stopping, work_dtype
from equilibria.transforms import differentiating, without_derivatives


@dataclass(frozen=True, kw_only=True)
class Shine:
    """The implicit gradient, with u = g H as first guess of u = u J + g, where H ≈ (I - J)⁻¹ is the forward solver's.

    Broyden and Anderson end with such an estimate in their history, each sample with its own; it is held until the
    backward pass, 2 · history states. One vector-Jacobian product measures the guess. A sample for which it is worse
    than nothing (‖g - u (I - J)‖ > ‖g‖) falls back on the Jacobian-free u = g, if that is better. `refine` more products
    improve what was found, as far as `rtol`: 0 takes the guess as it is, many give the gradient of `Implicit`. What was
    reached stands in `stats.backward`.

    How good the guess is depends on how much of g lies in the few directions that the forward solve explored: on random
    maps and gradients it saves about one product in ten, so look at `stats.backward` before you lower `refine`.

    Where derivatives of the gradient itself are wanted, and inside torch.func transforms, the system is solved from u = 0
    to `rtol`. In training the batch of the forward solve stays whole.

    Source: Ramzi, Mannel, Bai, Starck, Ciuciu and Moreau 2022, "SHINE: SHaring the INverse Estimate from the forward pass
    for bi-level optimization and implicit models", sections 2 and 3.

    >>> import torch
    >>> from equilibria import Broyden, fixed_point
    >>> a = torch.ones(1, 1, requires_grad=True)
    >>> z, stats = fixed_point(
    ...     lambda z, a: 0.5 * z + a, torch.zeros(1, 1), a, solver=Broyden(), adjoint=Shine(refine=0)
    ... )
    >>> round(float(torch.autograd.grad(z.sum(), a)[0]), 3)
    2.0
    """

    refine: int = 5
    """Most products spent on the guess after it was measured."""
    rtol: float = 1e-4
    """Relative tolerance of the backward system."""
    solver: Solver[Any] = field(default_factory=GMRES)
    """Of the backward system."""

    def __post_init__(self) -> None:
        check_count("Shine", "refine", self.refine, 0)
        check_choice("solver", self.solver, ("init", "step"), "GMRES()")
        Stopping(rtol=self.rtol)  # refuses what is no tolerance

    def solve(self, f: DeclaredFunction, z0: Tensor, args: tuple[Tensor, ...], forward: Forward) -> Solved:
        fz0 = forward.probe(f, z0, args, check_grad=differentiating())
        estimate = None
        if differentiating():
            estimate = _Estimate(forward.solver, copies=forward.stopping.check_every > 1)
            forward.search = partial(iterate, watch=estimate)
        return implicit(_Reuse(self, estimate), f, forward, without_derivatives(z0), fz0, args)


class _Estimate:
    """The estimate of (I - J)⁻¹ that a solver had of each sample when that sample was frozen or the budget spent."""

    def __init__(self, solver: Solver[Any], *, copies: bool) -> None:
        """`copies`: the solver may go on when all samples are frozen."""
        self.solver, self.copies = solver, copies
        self.latest: State | None = None
        self.running: Tensor | None = None
        self.frozen: list[tuple[Tensor, State]] = []

    def __call__(self, state: State, better: Tensor, running: Tensor) -> None:
        """Told of every step. The state of a sample that was frozen while others go on is copied: the next step of these
        writes over it."""
        if not isinstance(state, InverseEstimate):
            raise ValueError(
                "Shine() takes up the estimate of (I - J)⁻¹ that Broyden and Anderson make; give one of them as solver "
                f"instead of {self.solver!r}, or use Implicit()"
            )
        before = torch.ones_like(running) if self.running is None else self.running
        rows = (before & ~running).nonzero().squeeze(1)
        if len(rows) and (self.copies or bool(running.any())):
            self.frozen.append((rows, state.take(rows)))
        self.latest, self.running = state, running

    def pull(self, g: Tensor) -> Tensor:
        """gᵀ H, (B, D)."""
        exact = g.to(work_dtype(g.dtype))
        assert isinstance(self.latest, InverseEstimate)
        found = self.latest.pull(exact)
        for rows, state in self.frozen:
            assert isinstance(state, InverseEstimate)
            found = found.index_copy(0, rows, state.pull(exact.index_select(0, rows)))
        return found.to(g.dtype)


@dataclass(frozen=True)
class _Reuse:
    """The rule of one solve: how its backward systems are solved."""

    shine: Shine
    estimate: _Estimate | None

    def linear(self, system: LinearSystem) -> Tensor:
        shine, stopping = self.shine, Stopping(rtol=self.shine.rtol)
        if not system.recorded or self.estimate is None:
            return Implicit(solver=shine.solver, stopping=stopping).linear(system)
        run = linear_run(shine.solver, stopping)
        u, fu = self._start(system, run)
        run.stopping = Stopping(rtol=shine.rtol, max_evals=run.evaluations + shine.refine)
        return system.solve(self, run, u, fu)

    def _start(self, system: LinearSystem, run: Forward) -> tuple[Tensor, Tensor]:
        """Where the search begins, and the map there: the guess, or g for samples where that is better."""
        assert self.estimate is not None
        norm, g = run.stopping.norm, system.g
        u = self.estimate.pull(g)
        fu = system(u)
        run.evaluations += 1
        # Where nothing is asked for, u = 0, also if J is not finite there.
        asked = (norm(g) > 0).unsqueeze(1)
        u, fu = torch.where(asked, u, 0.0), torch.where(asked, fu, g)
        error = norm(fu - u)
        good = error <= norm(g)  # false for NaN
        if bool(good.all()):
            return u, fu
        plain = system(g)
        run.evaluations += 1
        keep = (good | (error <= norm(plain - g))).unsqueeze(1)
        return torch.where(keep, u, g), torch.where(keep, fu, plain)
