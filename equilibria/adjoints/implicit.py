"""Implicit differentiation: the gradient of a fixed point, by the implicit function theorem."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from equilibria.adjoints.adjoint import DeclaredFunction, Forward, Function, stats_of
from equilibria.iterate import Solved
from equilibria.products import linearize
from equilibria.solution import NonFiniteError, Stats
from equilibria.solvers import GMRES, Solver
from equilibria.solvers.solver import check_choice
from equilibria.stopping import Stopping
from equilibria.transforms import differentiating, forward_modes, transformed, without_derivatives


@dataclass(frozen=True, kw_only=True)
class Implicit:
    """Gradients at the fixed point itself, whatever way the solver took to it.

    With z* = f(z*, a) and J = ∂f/∂z at z*, an incoming gradient g (the row vector ∂loss/∂z*) gives

    ∂loss/∂a = u ∂f/∂a,   where u = u J + g

    is again a fixed point, of an affine map, solved with `solver` to `stopping`. Between forward and backward only z* is
    held, not the activations of f. Second derivatives, forward mode and torch.func transforms work, since u is had from
    another implicit solve wherever it must be differentiated. z0 receives no gradient: the fixed point does not depend
    on where the search began.

    Source: Bai, Kolter and Koltun 2019, section 3.1.2 (theorem 1).

    >>> import torch
    >>> from equilibria import fixed_point
    >>> a = torch.ones(1, 1, requires_grad=True)
    >>> z, stats = fixed_point(lambda z, a: 0.5 * z + a, torch.zeros(1, 1), a, adjoint=Implicit())
    >>> round(float(torch.autograd.grad(z.sum(), a)[0]), 3)
    2.0
    """

    solver: Solver[Any] = field(default_factory=GMRES)
    """Of the backward system. GMRES needs the fewest evaluations; Picard, Anderson and Broyden work as well."""
    stopping: Stopping = field(default_factory=lambda: Stopping(rtol=1e-4, max_evals=50))
    """Of the backward system; an evaluation is one vector-Jacobian product."""
    on_backward: Callable[[Stats], None] | None = None
    """Called with the statistics of each backward solve, for logging."""

    def __post_init__(self) -> None:
        check_choice("solver", self.solver, ("init", "step"), "GMRES()")
        check_choice("stopping", self.stopping, ("tolerance",), "Stopping(rtol=1e-4)")
        if self.on_backward is not None and not callable(self.on_backward):
            raise TypeError(f"Implicit(on_backward={self.on_backward!r}): on_backward must be a function of Stats, or None")

    def solve(self, f: DeclaredFunction, z0: Tensor, args: tuple[Tensor, ...], forward: Forward) -> Solved:
        fz0 = forward.probe(f, z0, args, check_grad=differentiating())
        return Solved(*_FixedPoint.apply(self, f, forward, without_derivatives(z0), fz0, *args))  # type: ignore[misc]

    def linear(self) -> Forward:
        """Runs the affine solves that derivatives need."""
        return Forward(self.solver, self.stopping, raise_nonfinite=True, affine=True, what="backward solve")

    def report(self, solved: Solved, run: Forward) -> None:
        """Pass on what a solve for derivatives cost."""
        if self.on_backward is not None:
            self.on_backward(stats_of(solved, run.evaluations))


class _FixedPoint(torch.autograd.Function):
    """z0, f(z0), *args -> the fields of Solved; args, all that f declares, receive gradients."""

    @staticmethod
    def forward(adjoint: Implicit, f: Function, forward: Forward, z0: Tensor, fz0: Tensor, *args: Tensor) -> Any:
        return tuple(forward(f, z0, fz0, args))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        adjoint, f, _, _, _, *args = inputs
        ctx.adjoint, ctx.f = adjoint, f
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output[0], *args)
        ctx.save_for_forward(output[0], *args)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        g = gradients[0]
        z, *args = ctx.saved_tensors
        wanted = [needed and arg.is_floating_point() for needed, arg in zip(ctx.needs_input_grad[5:], args, strict=True)]
        if g is None or not any(wanted):
            return (None,) * (5 + len(args))
        pull = _differentiable if torch.is_grad_enabled() or transformed() else _once
        found = iter(pull(ctx.adjoint, ctx.f, z, args, wanted, g))
        return (None, None, None, None, None, *(next(found) if want else None for want in wanted))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        if forward_modes() > 1:
            raise NotImplementedError(
                "forward mode inside forward mode is not supported by Implicit(); nest a forward inside a reverse mode: "
                "torch.func.hessian, or jacfwd(jacrev(f))"
            )
        z, *args = ctx.saved_tensors
        moved = [(i, t) for i, t in enumerate(tangents[5:]) if t is not None]
        if not moved:
            return (torch.zeros_like(z), None, None, None, None, None)
        places = [i for i, _ in moved]

        def of_args(*values: Tensor) -> Tensor:
            return ctx.f(z, *_with(args, places, values))

        push = linearize(of_args, *(args[i] for i in places))[1](*(t for _, t in moved))
        tangent = _solve(ctx.adjoint, _PushMap(ctx.f), push, z, *args)
        return (tangent, None, None, None, None, None)

    @staticmethod
    def vmap(  # pyright: ignore[reportIncompatibleMethodOverride]
        info: Any, in_dims: tuple[Any, ...], adjoint: Implicit, f: Function, forward: Forward,
        z0: Tensor, fz0: Tensor, *args: Tensor,
    ) -> Any:  # fmt: skip
        """A batch of solves is one solve with a larger batch, so that every sample still stops by itself."""
        size = info.batch_size
        states = [
            (value.expand(size, *value.shape) if dim is None else value.movedim(dim, 0)).flatten(0, 1)
            for value, dim in zip((z0, fz0), in_dims[3:5], strict=True)
        ]
        batched = _Batched(f, in_dims[5:], size)
        z, *rest, trace = _FixedPoint.apply(adjoint, batched, forward, *states, *args)  # type: ignore[misc]
        outputs = (*(value.unflatten(0, (size, -1)) for value in (z, *rest)), trace.unflatten(1, (size, -1)))
        return outputs, (0, 0, 0, 0, 0, 1)


def _once(
    adjoint: Implicit, f: Function, z: Tensor, args: Sequence[Tensor], wanted: Sequence[bool], g: Tensor
) -> Sequence[Tensor | None]:
    """Gradients that need no further derivative: f is recorded once, and each evaluation of the backward solve, like the
    gradients at its end, is a backward pass over that record."""
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        args = [arg.detach().requires_grad_(want) for arg, want in zip(args, wanted, strict=True)]
        output = f(z, *args)
    if not output.requires_grad:
        return [None] * sum(wanted)

    run = adjoint.linear()
    try:
        solved = run(_Recorded(z, output, g), torch.zeros_like(g), g, ())  # at u = 0 the map gives g
    except NonFiniteError as error:
        if bool(g.isfinite().all()):
            raise
        message = "the gradient that reaches the fixed point is already inf or NaN: the fault lies in the loss or between"
        raise NonFiniteError(message, error.solution) from None
    adjoint.report(solved, run)
    inputs = [arg for arg, want in zip(args, wanted, strict=True) if want]
    return torch.autograd.grad(output, inputs, solved.z, allow_unused=True)


def _differentiable(
    adjoint: Implicit, f: Function, z: Tensor, args: Sequence[Tensor], wanted: Sequence[bool], g: Tensor
) -> Sequence[Tensor | None]:
    """Gradients that may be differentiated again or transformed: u is an implicit function of g, z and args."""
    u = _solve(adjoint, _PullMap(f), g, z, *args)
    places = [i for i, want in enumerate(wanted) if want]
    pullback = torch.func.vjp(lambda *values: f(z, *_with(args, places, values)), *(args[i] for i in places))[1]
    return pullback(u)


def _solve(adjoint: Implicit, f: Function, offset: Tensor, *args: Tensor) -> Tensor:
    """u = A u + offset for an affine f, searched from u = 0, where f gives the offset."""
    run = adjoint.linear()
    solved = Solved(*_FixedPoint.apply(adjoint, f, run, torch.zeros_like(offset), offset, offset, *args))  # type: ignore[misc]
    if not transformed():
        adjoint.report(solved, run)
    return solved.z


class _Recorded:
    """u -> g + u J, where J is that of a record of f: every call is one pass over the same record."""

    dims = None

    def __init__(self, z: Tensor, fz: Tensor, g: Tensor) -> None:
        self.z, self.fz, self.g = z, fz, g

    def __call__(self, u: Tensor, *tensors: Tensor) -> Tensor:
        (uj,) = torch.autograd.grad(self.fz, self.z, u, retain_graph=True, allow_unused=True)
        return self.g if uj is None else self.g + uj


class _Derived:
    """A map made from f, which was probed when it was solved."""

    dims = None

    def __init__(self, f: Function) -> None:
        self.f = f


class _PullMap(_Derived):
    """u -> g + u J, with J = ∂f/∂z at z."""

    def __call__(self, u: Tensor, *tensors: Tensor) -> Tensor:
        g, z, *args = tensors
        pullback = torch.func.vjp(lambda z: self.f(z, *args), z)[1]
        return g + pullback(u)[0]


class _PushMap(_Derived):
    """v -> t + J v, with J = ∂f/∂z at z."""

    def __call__(self, u: Tensor, *tensors: Tensor) -> Tensor:
        t, z, *args = tensors
        return t + linearize(lambda z: self.f(z, *args), z)[1](u)


class _Batched(_Derived):
    """f over an extra leading batch dimension of `size`, folded into the batch: z (size · B, D)."""

    def __init__(self, f: Function, in_dims: Sequence[int | None], size: int) -> None:
        super().__init__(f)
        self.in_dims, self.size = in_dims, size

    def __call__(self, u: Tensor, *tensors: Tensor) -> Tensor:
        many = torch.vmap(self.f, in_dims=(0, *self.in_dims))
        return many(u.unflatten(0, (self.size, -1)), *tensors).flatten(0, 1)


def _with(args: Sequence[Tensor], places: Sequence[int], values: Sequence[Tensor]) -> list[Tensor]:
    replaced = list(args)
    for place, value in zip(places, values, strict=True):
        replaced[place] = value
    return replaced
