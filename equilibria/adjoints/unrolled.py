"""Unrolled differentiation: autograd records the solver's own steps."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from equilibria.adjoints.adjoint import DeclaredFunction, Forward
from equilibria.iterate import BudgetedMap, Loop, Record, Solved
from equilibria.solvers.solver import Solver, State
from equilibria.stopping import Stopping
from equilibria.transforms import differentiating, hides_batch, transformed


@dataclass(frozen=True, kw_only=True)
class Unrolled:
    """The exact gradient of what the solver computed, converged or not. Memory grows with the number of evaluations.

    Gradients flow to z0 as well, and through tensors that f uses without being passed them.

    With `checkpoint`, only the state of the solver after every √max_evals steps is kept; each segment is computed a second
    time when the backward pass reaches it. Memory then grows with the square root of the budget, and the gradient is the
    same. The batch stays whole. Not inside torch.func transforms, which PyTorch's checkpointing does not support.

    Inside torch.vmap, where a sample cannot be asked whether it is done, every solve spends its whole budget; samples are
    frozen all the same, and no status raises.

    Source of the checkpoints: Chen, Xu, Zhang and Guestrin 2016, "Training deep nets with sublinear memory cost".

    >>> import torch
    >>> from equilibria import Picard, Stopping, fixed_point
    >>> a = torch.ones(1, 1, requires_grad=True)
    >>> z, _ = fixed_point(
    ...     lambda z, a: 0.5 * z + a, torch.zeros(1, 1), a,
    ...     solver=Picard(), stopping=Stopping(max_evals=3), adjoint=Unrolled(),
    ... )
    >>> float(torch.autograd.grad(z.sum(), a)[0])
    1.5
    """

    checkpoint: bool = False

    def solve(self, f: DeclaredFunction, z0: Tensor, args: tuple[Tensor, ...], forward: Forward) -> Solved:
        fz0 = forward.probe(f, z0, args, check_grad=False)
        if hides_batch():
            forward.search, forward.raise_nonfinite = _to_the_end, False
            return forward(f, z0, fz0, args)
        if not self.checkpoint or not differentiating():
            return forward(f, z0, fz0, args)
        if transformed():
            raise NotImplementedError(
                "Unrolled(checkpoint=True) does not work inside torch.func transforms; use Unrolled() or Implicit()"
            )
        forward.search = _in_segments
        return forward(f, z0, fz0, args)


def _to_the_end(solver: Solver[Any], f: BudgetedMap, z0: Tensor, stopping: Stopping) -> Solved:
    """`iterate` inside torch.vmap, where nobody can ask whether a sample is done: the whole budget is spent."""
    if not getattr(solver, "traceable", False):
        raise NotImplementedError(
            f"Unrolled() under torch.vmap needs a solver whose steps do not depend on values, and those of {solver!r} do; "
            "use Picard(), Anderson() or Broyden() without line search, or Implicit()"
        )
    loop = Loop(solver, stopping)
    state, record = loop.start(f, z0)
    state = state.with_tensor_counts()
    while f.remaining > 0:
        state = loop.advance(f, state, record)
    return record.solved(stopping)


def _in_segments(solver: Solver[Any], f: BudgetedMap, z0: Tensor, stopping: Stopping) -> Solved:
    """`iterate`, with what autograd needs of the steps computed again in the backward pass."""
    loop = Loop(solver, stopping)
    length = ceil(stopping.max_evals**0.5)

    def segment(state: State, record: Record, spent: int) -> tuple[State, Record, int]:
        # Called twice, and must find the same both times: so it changes nothing that it is given.
        part, record = BudgetedMap(f.f, f.args, f.max_evals), record.copy()
        part.evaluations = spent
        for _ in range(length):
            if part.remaining <= 0 or not bool(record.running.any()):
                break
            state = loop.advance(part, state, record)
        return state, record, part.evaluations

    state, record = loop.start(f, z0)
    while f.remaining > 0 and bool(record.running.any()):
        state, record, f.evaluations = checkpoint(
            segment, state, record, f.evaluations, use_reentrant=False, preserve_rng_state=False
        )
    return record.solved(stopping)
