"""The autograd function behind the adjoints that differentiate at the fixed point itself.

Every derivative of z* = f(z*, a) there, of first or higher order, reverse or forward, takes the solution of one affine
system, u = A u + g, where A v is a product with J = ∂f/∂z at z*: from the left in reverse, from the right in forward mode.
How it is solved is the adjoint's to say.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from equilibria.adjoints.adjoint import DeclaredFunction, Forward, Function, differentiable, leaves_of, wanted
from equilibria.compiled import recorded_to_stay
from equilibria.iterate import Solved
from equilibria.products import linearize
from equilibria.solution import NonFiniteError, UndeclaredTensorError
from equilibria.solvers import Solver
from equilibria.stopping import Stopping
from equilibria.transforms import (
    carries_derivatives,
    differentiating,
    forward_modes,
    hides_batch,
    through_old_vmap,
    transformed,
    without_derivatives,
)

_told: list[Callable[[NonFiniteError], None]] = []  # no context variable: backward passes have threads of their own


@contextmanager
def tell_nonfinite(report: Callable[[NonFiniteError], None]) -> Iterator[None]:
    """Within it, a backward solve that is not finite is reported and gives a gradient of NaN, where it raises elsewhere.

    For processes that share a backward pass: were it cut short in one, the others would wait for what it never sends.
    """
    _told.append(report)
    try:
        yield
    finally:
        _told.pop()


class LinearSystem:
    """u = A u + g, with u = 0 as the place to start from; `f(u, *args)` is the right-hand side.

    `recorded`: f replays a record, and u takes no part in any further derivative. Otherwise u must be a differentiable
    function of the args, g among them.
    """

    def __init__(self, f: Function, g: Tensor, args: tuple[Tensor, ...], forward: Forward, *, recorded: bool) -> None:
        self.f, self.g, self.args, self.forward, self.recorded = f, g, args, forward, recorded
        self._solved: tuple[Forward, Solved] | None = None

    def __call__(self, u: Tensor) -> Tensor:
        """A u + g."""
        return self.f(u, *self.args)

    def solve(self, rule: Rule, run: Forward, u0: Tensor | None = None, fu0: Tensor | None = None) -> Tensor:
        """u, by the solver of `run`; what it cost is reported to the solution that is differentiated."""
        start, known = (torch.zeros_like(self.g), self.g) if u0 is None or fu0 is None else (u0, fu0)
        try:
            run.confirms = not self.recorded  # `confirm` does it then, at no cost
            if self.recorded:
                solved = run(self.f, start, known, self.args)
            else:
                solved = implicit(rule, self.f, run, start, known, self.args)
        except NonFiniteError as error:
            fault = error
            if not bool(self.g.isfinite().all()):
                reason = (
                    "the gradient that reaches the fixed point is already inf or NaN: the fault lies in the loss or between"
                )
                fault = NonFiniteError(reason, error.solution)
            if not _told:
                raise fault from None
            _told[-1](fault)
            return torch.full_like(self.g, torch.nan)
        if self.recorded:
            self._solved = run, solved
        elif not hides_batch():
            self.forward.backward.append(run.stats(Solved(*map(without_derivatives, solved))))
        return solved.z

    def confirm(self, fu: Tensor, again: Callable[[Tensor], Tensor]) -> None:
        """Report the solve, where A u + g at the u that it found is known now to be `fu`; `again` computes it elsewhere."""
        if self._solved is not None:
            run, solved = self._solved
            self.forward.backward.append(run.stats(run.measured(solved, fu, self.g, again)))


def linear_run(solver: Solver[Any], stopping: Stopping) -> Forward:
    """Runs the solve of a linear system."""
    return Forward(solver, stopping, raise_nonfinite=True, affine=True, what="backward solve")


class Rule(Protocol):
    """How the affine systems of derivatives are solved."""

    def linear(self, system: LinearSystem) -> Tensor:
        """u (B, D) with u = A u + g, or as near to it as this adjoint wants it."""
        ...


def fixed_point_of(rule: Rule, f: DeclaredFunction, z0: Tensor, args: tuple[Tensor, ...], forward: Forward) -> Solved:
    """The fixed point of what a user gave, differentiable in args by `rule`."""
    fz0 = forward.probe(f, z0, args, check_grad=differentiating())
    return implicit(rule, f, forward, without_derivatives(z0), fz0, args)


def implicit(rule: Rule, f: Function, forward: Forward, z0: Tensor, fz0: Tensor, args: Sequence[Tensor]) -> Solved:
    """The fixed point of f, searched from z0, differentiable in args by `rule`."""
    if not transformed() and not (differentiating() and any(map(carries_derivatives, args))):
        with torch.no_grad():
            return forward(f, z0, fz0, args)
    return Solved(*_FixedPoint.apply(rule, f, forward, z0, fz0, *args))  # type: ignore[misc]


class _FixedPoint(torch.autograd.Function):
    """z0, f(z0), *args -> the fields of Solved; args, all that f declares, receive gradients."""

    @staticmethod
    def forward(rule: Rule, f: Function, forward: Forward, z0: Tensor, fz0: Tensor, *args: Tensor) -> Any:
        # Detached, what was computed before the solve looks to a compiled f as it does without gradients: one graph less.
        # What belongs to f stays the same object, so that f runs as it is.
        args = tuple(arg if arg.is_leaf else arg.detach() for arg in args)
        return tuple(forward(f, z0, fz0, args))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.rule, ctx.f, ctx.run, _, _, *args = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output[0], *args)
        ctx.save_for_forward(output[0], *args)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        g = gradients[0]
        z, *args = ctx.saved_tensors
        wants = wanted(ctx.needs_input_grad[5:], args)
        if g is None or not any(wants):
            return (None,) * (5 + len(args))

        def pull(g: Tensor) -> Sequence[Tensor | None]:
            way = _differentiable if torch.is_grad_enabled() or transformed() else _once
            return way(ctx, z, args, wants, g)

        found = iter(through_old_vmap(pull, g))
        return (None, None, None, None, None, *(next(found) if want else None for want in wants))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        if forward_modes() > 1:
            raise NotImplementedError(
                "forward mode inside forward mode is not supported through a fixed point; nest a forward inside a reverse "
                "mode: torch.func.hessian, or jacfwd(jacrev(f))"
            )
        z, *args = ctx.saved_tensors
        moved = [(i, t) for i, t in enumerate(tangents[5:]) if t is not None]
        if not moved:
            return (torch.zeros_like(z), None, None, None, None, None)
        places = [i for i, _ in moved]

        def tangent(*moves: Tensor) -> Tensor:
            def of_args(*values: Tensor) -> Tensor:
                return ctx.f(z, *_with(args, places, values))

            push = linearize(of_args, *(args[i] for i in places))[1](*moves)
            return ctx.rule.linear(LinearSystem(_PushMap(ctx.f), push, (push, z, *args), ctx.run, recorded=False))

        return (through_old_vmap(tangent, *(t for _, t in moved)), None, None, None, None, None)

    @staticmethod
    def vmap(  # pyright: ignore[reportIncompatibleMethodOverride]
        info: Any, in_dims: tuple[Any, ...], rule: Rule, f: Function, forward: Forward,
        z0: Tensor, fz0: Tensor, *args: Tensor,
    ) -> Any:  # fmt: skip
        """A batch of solves is one solve with a larger batch, so that every sample still stops by itself."""
        size = info.batch_size
        states = [
            (value.expand(size, *value.shape) if dim is None else value.movedim(dim, 0)).flatten(0, 1)
            for value, dim in zip((z0, fz0), in_dims[3:5], strict=True)
        ]
        batched = _Batched(f, in_dims[5:], size)
        fixed = implicit(rule, batched, forward, states[0], states[1], args)
        z, *rest, trace = fixed
        outputs = (*(value.unflatten(0, (size, -1)) for value in (z, *rest)), trace.unflatten(1, (size, -1)))
        return outputs, (0, 0, 0, 0, 0, 1)


# torch asks for it at every call, and to find it out takes as long as ten evaluations of a small f.
_FixedPoint.forward.__signature__ = inspect.signature(_FixedPoint.forward)  # pyright: ignore[reportFunctionMemberAccess]


def _once(ctx: Any, z: Tensor, args: Sequence[Tensor], wants: Sequence[bool], g: Tensor) -> Sequence[Tensor | None]:
    """Gradients that need no further derivative: f is recorded once, and each evaluation of the backward solve, like the
    gradients at its end, is a backward pass over that record."""
    z, args, inputs = leaves_of(z, args, wants)
    record = _recorded(ctx.f, z, args, g)
    if not record.fz.requires_grad:
        if _constant(ctx.f, z, args, record.fz):
            return [None] * sum(wants)
        raise UndeclaredTensorError(
            "f(z, *args) carries no gradient, neither of z nor of args: f runs under torch.no_grad(), or detaches what it "
            "returns, and gradients would be lost; if none are wanted, solve under torch.no_grad()"
        )
    system = LinearSystem(record, g, (), ctx.run, recorded=True)
    u = ctx.rule.linear(system)
    # With the gradients comes u J, and with it the true residual of the backward solve.
    uj, *gradients = torch.autograd.grad(record.fz, inputs, u, allow_unused=True)
    system.confirm(g if uj is None else g + uj, lambda u: _recorded(ctx.f, z, args, g)(u))
    return gradients


def _differentiable(
    ctx: Any, z: Tensor, args: Sequence[Tensor], wants: Sequence[bool], g: Tensor
) -> Sequence[Tensor | None]:
    """Gradients that may be differentiated again or transformed: u is a function of g, z and args."""
    u = ctx.rule.linear(LinearSystem(_PullMap(ctx.f), g, (g, z, *args), ctx.run, recorded=False))
    places = [i for i, want in enumerate(wants) if want]
    pullback = torch.func.vjp(lambda *values: ctx.f(z, *_with(args, places, values)), *(args[i] for i in places))[1]
    return pullback(u)


@torch.enable_grad()
def _recorded(f: Function, z: Tensor, args: Sequence[Tensor], g: Tensor) -> _Recorded:
    return _Recorded(f, z, args, g)


class _Recorded:
    """u -> g + u J, where J is that of a record of f: every call is one pass over the same record."""

    dims = None

    def __init__(self, f: Function, z: Tensor, args: Sequence[Tensor], g: Tensor) -> None:
        self.z, self.g = z, g
        self.fz, self._replaying = recorded_to_stay(lambda: f(z, *args))

    def __call__(self, u: Tensor, *tensors: Tensor) -> Tensor:
        with self._replaying():
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


@torch.no_grad()
def _constant(f: Function, z: Tensor, args: Sequence[Tensor], fz: Tensor) -> bool:
    """Whether f gives fz elsewhere too."""
    elsewhere = [1.001 * arg + 0.001 if differentiable(arg) else arg for arg in (z, *args)]
    return torch.equal(f(*elsewhere), fz)


def _with(args: Sequence[Tensor], places: Sequence[int], values: Sequence[Tensor]) -> list[Tensor]:
    replaced = list(args)
    for place, value in zip(places, values, strict=True):
        replaced[place] = value
    return replaced
