"""What an adjoint is: the part of a fixed point that decides how gradients are had."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from equilibria.iterate import BudgetedMap, Solved, iterate, ratio
from equilibria.solution import NonFiniteError, Solution, Stats, Status
from equilibria.solvers import GMRES, Solver
from equilibria.solvers.solver import difference
from equilibria.stopping import Stopping

Search = Callable[[Solver[Any], BudgetedMap, Tensor, Stopping], Solved]
"""`iterate`, or a variant of it that an adjoint needs."""


class Function(Protocol):
    """A pure function of tensors, z (B, D), *tensors -> (B, D)."""

    @property
    def dims(self) -> Sequence[int | None] | None:
        """For each tensor the dimension that carries the batch, or None; None: not known, the batch must stay whole."""
        ...

    def __call__(self, z: Tensor, /, *tensors: Tensor) -> Tensor: ...


class DeclaredFunction(Function, Protocol):
    """A function given by a user, which may not be as pure as it should."""

    def probe(self, z: Tensor, /, *tensors: Tensor, check_grad: bool) -> Tensor:
        """The same value; raises where f is random or, with `check_grad`, uses tensors it does not declare."""
        ...


class Forward:
    """Runs a solve, without caring for gradients, and remembers what it cost."""

    def __init__(
        self,
        solver: Solver[Any],
        stopping: Stopping,
        *,
        raise_nonfinite: bool,
        affine: bool = False,
        what: str = "solve",
    ) -> None:
        self.solver = solver
        self.stopping = stopping
        self.raise_nonfinite = raise_nonfinite
        self.affine = affine
        self.what = what
        self.evaluations = 0
        self.backward: list[Stats] = []
        self.search: Search = iterate
        self.confirms = True
        """Whether a residual that the solver knows by a recurrence is measured, by one evaluation more."""

    def probe(self, f: DeclaredFunction, z0: Tensor, args: Sequence[Tensor], *, check_grad: bool) -> Tensor:
        """f(z0), with the checks that f is deterministic and declares what it uses; it counts as an evaluation."""
        self.evaluations += 1
        return f.probe(z0, *args, check_grad=check_grad)

    def __call__(self, f: Function, z0: Tensor, fz0: Tensor, args: Sequence[Tensor]) -> Solved:
        """Solve from z0, where f(z0) is known to be fz0."""
        confirm = isinstance(self.solver, GMRES) and self.confirms
        budget = self.stopping.max_evals - (confirm and not self.affine)
        budgeted = BudgetedMap(f, args, budget, f.dims, known=fz0)
        budgeted.evaluations = self.evaluations
        device = z0.device.type
        # Autocast is for f, which enters it by itself; the solver's own small systems would be rounded by it.
        with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
            solved = self.search(self.solver, budgeted, z0, self.stopping)
        self.evaluations = budgeted.evaluations
        # What was given may belong to the caller, and an autograd function must not return it.
        if solved.z is z0 or solved.z is fz0:
            solved = solved._replace(z=solved.z.clone())
        if confirm and bool((solved.steps > 0).any()):  # at z0 itself the residual was measured
            solved = self.measured(solved, f(solved.z, *args), fz0, lambda z: f(z, *args))
            self.evaluations += 1
        if self.raise_nonfinite and bool((solved.status == Status.NONFINITE).any()):
            raise self._nonfinite(solved)
        return solved

    def stats(self, solved: Solved) -> Stats:
        """What is reported of the solve; the list `backward` in it is filled when derivatives are taken."""
        return Stats(
            residual=solved.residual,
            relative=solved.relative,
            evaluations=self.evaluations,
            steps=solved.steps,
            status=solved.status,
            trace=solved.trace if solved.trace.shape[0] else None,
            backward=self.backward,
        )

    def measured(self, solved: Solved, fz: Tensor, fz0: Tensor, f: Callable[[Tensor], Tensor]) -> Solved:
        """The same with its residual as it is at the z found, where f gives fz; f is called again only if that is far off.

        GMRES knows its residual by a recurrence that holds for maps that are affine and treat each sample by itself.
        """
        if not isinstance(self.solver, GMRES):
            return solved
        norm = self.stopping.norm
        residual, scale = norm(difference(fz, solved.z).detach()), norm(fz.detach())
        claimed = solved.status == Status.CONVERGED
        missed = claimed & ~(residual <= self.stopping.tolerance(scale))
        # Rounding may leave a sample that converged on paper above the tolerance; an f of another kind, far above.
        large = max(0.01, 8 * torch.finfo(fz.dtype).eps) * (scale + norm(solved.z.detach()) + norm(fz0.detach()))
        far = missed & (residual > large)
        # A Jacobian of huge entries, as of a model that diverges, has rounding errors as large; f is to blame if it mixes.
        if bool(far.any()) and not (self.affine and _keeps_apart(f, solved.z.detach(), int(residual.argmax()))):
            raise ValueError(
                f"the residual of the {self.what} is {residual.max():.2e}, and GMRES claims {solved.residual.max():.2e}: "
                f"{self._kind()}"
            )
        status = torch.where(missed, int(Status.EXHAUSTED), solved.status).to(torch.int8)
        return solved._replace(residual=residual, relative=ratio(residual, scale), status=status)

    def _kind(self) -> str:
        if self.affine:
            return (
                "f mixes samples. Dimension 0 of the state is the batch, and every sample must be mapped by itself: give a "
                "single state as z0.unsqueeze(0), and samples that belong together (the nodes of a graph) as one sample"
            )
        return "GMRES solves affine maps f(z) = A z + b alone, and this f is not affine, or mixes samples; use Anderson()"

    def _nonfinite(self, solved: Solved) -> NonFiniteError:
        failed = (solved.status == Status.NONFINITE).nonzero().squeeze(1).tolist()
        first = min(int(solved.steps[i]) for i in failed)
        remedy = (
            "I - J may be singular at the fixed point, or f have no finite derivative there; Jacobian regularisation or "
            "Phantom() avoids that solve"
            if self.affine
            else "f(z0) is not finite: look at the inputs, the parameters and z0"
            if first == 0
            else "the iteration diverges: use Anderson() or Broyden(), damping below 1, or regularise f; "
            "fixed_point(..., raise_nonfinite=False) returns the best finite iterate with Status.NONFINITE instead"
        )
        return NonFiniteError(
            f"the {self.what} became inf or NaN in {len(failed)} of {len(solved.status)} samples (first: sample "
            f"{failed[0]}; earliest at step {first}): {remedy}",
            Solution(solved.z, self.stats(solved)),
        )


def _keeps_apart(f: Callable[[Tensor], Tensor], u: Tensor, sample: int) -> bool:
    """Whether the other samples of u leave what an affine f makes of one sample as it is."""
    others = u.clone()
    others[sample] = 0.0
    return torch.equal(f(others)[sample], f(torch.zeros_like(u))[sample])


def differentiable(tensor: Tensor) -> bool:
    """Whether a gradient can flow to a tensor of this dtype."""
    return tensor.is_floating_point() or tensor.is_complex()


def wanted(needed: Sequence[bool], args: Sequence[Tensor]) -> list[bool]:
    """Which args are to receive gradients, of those that autograd needs."""
    return [need and differentiable(arg) for need, arg in zip(needed, args, strict=True)]


def leaves_of(z: Tensor, args: Sequence[Tensor], wants: Sequence[bool]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """(z, args, inputs) cut off from their history, to record f anew: inputs are z and the args that want gradients."""
    z = z.detach().requires_grad_()
    args = [arg.detach().requires_grad_(want) for arg, want in zip(args, wants, strict=True)]
    return z, args, [z, *(arg for arg, want in zip(args, wants, strict=True) if want)]


class Adjoint(Protocol):
    """How a fixed point is differentiated."""

    def solve(self, f: DeclaredFunction, z0: Tensor, args: tuple[Tensor, ...], forward: Forward) -> Solved:
        """The fixed point, attached to autograd as this adjoint does it; `forward` runs the solve."""
        ...
