"""The equilibrium layer: a block whose output is its own fixed point."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from equilibria.adjoints import Adjoint, Implicit
from equilibria.fixed_point import fixed_point
from equilibria.nn.computed_once import WithConstants, computed_once
from equilibria.nn.pickling import make_picklable
from equilibria.solution import Solution
from equilibria.solvers import Anderson, Solver
from equilibria.stopping import Stopping

Block = TypeVar("Block", bound=nn.Module)


class DEQ(nn.Module, Generic[Block]):
    """z* = block(z*, *args), with args = block.prepare(*inputs).

    The block is an nn.Module with `forward(z, *args) -> z`. It may also define

    - `prepare(*inputs) -> tuple of args`: what stays constant while z moves (injected inputs, projections, masks of
      dropout), computed once per solve; gradients flow through it. Without it args are the inputs;
    - `initial(*inputs) -> z0`; without it, zeros like the first input;
    - `batch_dims`: one entry per arg, the dimension that carries the batch or None (see `fixed_point`).

    Tensors under `torch.nn.utils.parametrize` (weight norm, spectral norm, your own) are computed once per solve, before
    `prepare`, and keep that value in every evaluation, forward and backward; gradients flow through them. A block with such
    tensors that solves another equilibrium inside does so by a DEQ, not by `fixed_point`.

    `torch.save(deq, file)` works with parametrised blocks too, which torch by itself refuses to save as a whole. A file
    that is to be trusted less is better made of `deq.state_dict()`, loaded with `weights_only=True`.

    `eval_stopping` replaces `stopping` in evaluation mode, if given; `raise_nonfinite` is that of `fixed_point`. Solver,
    stopping and adjoint are plain attributes and may be exchanged at any time.

    Source: Bai, Kolter and Koltun 2019, "Deep equilibrium models", section 3.

    >>> class Cell(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.inner, self.outer = nn.Linear(4, 4), nn.Linear(3, 4)
    ...     def initial(self, x):
    ...         return x.new_zeros(len(x), 4)
    ...     def prepare(self, x):
    ...         return (self.outer(x),)
    ...     def forward(self, z, u):
    ...         return torch.tanh(0.5 * self.inner(z) + u)
    >>> z, stats = DEQ(Cell())(torch.randn(2, 3))
    >>> z.shape
    torch.Size([2, 4])
    """

    def __init__(
        self,
        block: Block,
        *,
        solver: Solver[Any] | None = None,
        stopping: Stopping | None = None,
        adjoint: Adjoint | None = None,
        eval_stopping: Stopping | None = None,
        raise_nonfinite: bool = True,
    ) -> None:
        super().__init__()
        if not isinstance(block, nn.Module):
            raise TypeError(f"DEQ needs an nn.Module, not a {type(block).__name__}; for a function use fixed_point")
        self.block: Block = block
        self.solver: Solver[Any] = Anderson() if solver is None else solver
        self.stopping = Stopping() if stopping is None else stopping
        self.adjoint: Adjoint = Implicit() if adjoint is None else adjoint
        self.eval_stopping = eval_stopping
        self.raise_nonfinite = raise_nonfinite

    def forward(self, *inputs: Any, z0: Any = None, stopping: Stopping | None = None) -> Solution:
        """The equilibrium for these inputs, searched from z0 if it is given (a warm start).

        `stopping` takes the place of the module's own for this call, such as a larger budget for a harder problem.
        """
        with computed_once(self.block):
            args = prepared(self.block, *inputs)
            return self.solve(initial(self.block, *inputs) if z0 is None else z0, *args, stopping=stopping)

    def solve(self, z0: Any, *args: Any, stopping: Stopping | None = None) -> Solution:
        """The equilibrium for the args that `prepare` made, for a caller that needs these args as well.

        Where `prepare` reads parametrised tensors, call both under `computed_once(deq.block)`: they share the values then.
        """
        if stopping is None:
            stopping = self.stopping if self.training or self.eval_stopping is None else self.eval_stopping
        block, batch_dims = self.block, getattr(self.block, "batch_dims", None)
        if isinstance(batch_dims, Sequence) and len(batch_dims) != len(args):
            raise ValueError(
                f"{type(block).__name__}.batch_dims has {len(batch_dims)} entries for {len(args)} args; give one per arg: "
                "the dimension that carries the batch, or None"
            )
        solver = self.solver_for(*args)
        with computed_once(block) as (places, values):
            if places:
                block, args = WithConstants(block, places), (values, *args)
                batch_dims = None if batch_dims is None else (None, *batch_dims)
            return fixed_point(
                block, z0, *args, solver=solver, stopping=stopping, adjoint=self.adjoint, batch_dims=batch_dims,
                raise_nonfinite=self.raise_nonfinite,
            )  # fmt: skip

    def solver_for(self, *args: Any) -> Solver[Any]:
        """The solver of a solve with these args: `self.solver`, unless a subclass makes one of them."""
        return self.solver

    def __getstate__(self) -> Any:
        make_picklable(self.block)
        return super().__getstate__()


def prepared(block: nn.Module, *inputs: Any) -> tuple[Any, ...]:
    """The args of a block: what its `prepare` makes of the inputs, or the inputs."""
    prepare: Callable[..., tuple[Any, ...]] | None = getattr(block, "prepare", None)
    if prepare is None:
        return inputs
    args = prepare(*inputs)
    if not isinstance(args, tuple):
        raise TypeError(
            f"{type(block).__name__}.prepare returned a {type(args).__name__}; it must return the tuple of args "
            "for forward(z, *args): a single one as (arg,)"
        )
    return args


def initial(block: nn.Module, *inputs: Any) -> Any:
    """Where the search starts: the block's `initial`, or zeros like the first input."""
    make: Callable[..., Any] | None = getattr(block, "initial", None)
    if make is not None:
        return make(*inputs)
    if not inputs or not isinstance(inputs[0], Tensor):
        raise TypeError(f"{type(block).__name__} needs a method initial(*inputs) -> z0: its first input is no tensor")
    return torch.zeros_like(inputs[0])
