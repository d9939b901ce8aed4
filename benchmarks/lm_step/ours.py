"""Our language model, as the training loop runs it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lm_step.shape import Batch, Found, Shape, Side, Solve
from torch import Tensor
from torch.utils._pytree import tree_map_only

from equilibria import GMRES, Anderson, Broyden, Implicit, Picard, Shine, Stopping
from equilibria.adjoints import Adjoint
from equilibria.models import DEQTransformerLM, Memory, TransformerConfig
from equilibria.solvers import Solver
from equilibria.train.config import OptimConfig
from equilibria.train.optimizer import make_optimizer

SOLVERS: dict[str, Callable[[], Solver[Any]]] = {
    "anderson": Anderson,
    "anderson, history 10": lambda: Anderson(history=10),
    "broyden": Broyden,
    "picard": Picard,
    "gmres": GMRES,
    "gmres, restart 8": lambda: GMRES(restart=8),
}


class Ours(Side):
    """A `DEQTransformerLM`, or with a depth its explicit twin."""

    name = "equilibria"

    def __init__(self, shape: Shape, depth: int | None = None) -> None:
        self.shape, self.depth = shape, depth
        config = TransformerConfig(
            vocab_size=shape.vocab, d_model=shape.d_model, n_head=shape.n_head, d_inner=shape.d_inner,
            mem_len=shape.memory, dropout=shape.dropout, cutoffs=shape.cutoffs, div_val=shape.div_val,
        )  # fmt: skip
        self.model = DEQTransformerLM(config)
        self.optimizer = make_optimizer(self.model, OptimConfig(lr=1e-12))
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0

    def use(self, forward: Solve, backward: Solve) -> None:
        stopping = Stopping(rtol=forward.tol, atol=0.0, max_evals=forward.evaluations)
        self.solve_to(forward.method, stopping, _adjoint(backward))

    def solve_to(self, method: str, stopping: Stopping, adjoint: Adjoint) -> None:
        """The solver of that name, with any tolerances."""
        deq = self.model.deq
        deq.solver, deq.stopping, deq.adjoint = SOLVERS[method](), stopping, adjoint

    def memory(self, z: Tensor, u: Tensor) -> Memory:
        return Memory(z, u)

    def loss(self, batch: Batch) -> Tensor:
        return self.model(*batch, depth=self.depth).nll.mean()

    def loss_at(self, z: Tensor, batch: Batch) -> Tensor:
        return self.model.softmax(self.model.output(z), batch.targets).mean()

    @contextmanager
    def watched(self) -> Iterator[Found]:
        found, deq, block = Found(), self.model.deq, self.model.block
        usual = deq.solve

        def solve(z0: Any, *args: Any, **kwargs: Any) -> Any:
            solution = usual(z0, *args, **kwargs)
            detached = tree_map_only(Tensor, Tensor.detach, args)
            found.z, found.f = solution.z.detach(), lambda z: block(z, *detached)
            return solution

        deq.solve = solve
        try:
            yield found
        finally:
            del deq.solve

    def gradients(self) -> dict[str, Tensor]:
        return through_equilibrium({n: p.grad for n, p in self.model.named_parameters() if p.grad is not None})

    def implicit_gradient(self, batch: Batch, z: Tensor) -> dict[str, Tensor]:
        """The gradients where z is taken for the equilibrium, the backward system solved until rounding sets the limit.

        A map may have several equilibria, and solvers come to different ones: so each gets the gradient at its own.
        """
        deq = self.model.deq
        usual = deq.solve
        stopping = Stopping(rtol=0.0, atol=0.0, max_evals=1)
        self.solve_to("picard", stopping, Implicit(stopping=Stopping(rtol=1e-6, atol=0.0, max_evals=100)))
        deq.solve = lambda z0, *args, **kwargs: usual(z, *args, **kwargs)
        try:
            return self.differentiate(batch)
        finally:
            del deq.solve


def _adjoint(backward: Solve) -> Adjoint:
    if backward.method == "shine":  # the guess is measured by one product
        return Shine(rtol=1e-30, refine=backward.evaluations - 1)
    stopping = Stopping(rtol=0.0, atol=0.0, max_evals=backward.evaluations)
    return Implicit(solver=SOLVERS[backward.method](), stopping=stopping)


def through_equilibrium(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those of the block and of the injection, by our names."""
    return {name: gradient for name, gradient in gradients.items() if name.startswith(("deq.", "inject."))}


def parameters_of(run: Any) -> dict[str, Tensor]:
    """The best weights of a run folder that was read by `load_run`."""
    return {name: tensor.detach().clone() for name, tensor in run.model().state_dict().items()}


def states(side: Ours, segments: list[tuple[Tensor, Tensor]], columns: int) -> Memory:
    """The last columns of a text that was read in segments."""
    memory = None
    side.model.eval()
    before, side.model.mem_len = side.model.mem_len, columns
    with torch.no_grad():
        for tokens, targets in segments:
            memory = side.model(tokens, targets, memory, depth=side.depth).memory
    side.model.mem_len = before
    assert memory is not None
    return memory
