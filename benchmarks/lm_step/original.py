"""The language model of the original code (locuslab/deq, 2021), run from a checkout of it.

What it needs to run on today's PyTorch without CUDA is put in place here, before it is imported: a version of CUDA to
parse, a `torch.cuda.synchronize` that has nothing to wait for, `torch.solve`, which was removed, and `termcolor`, which it
uses to colour warnings. None of it makes it slower.

It takes any solver of its form, so TorchDEQ's run in it as well.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lm_step.checkouts import importing
from lm_step.ours import through_equilibrium
from lm_step.shape import Batch, Found, Shape, Side, Solve
from torch import Tensor

from equilibria.interop.original.names import translate

MINE = "original "
THEIRS = "torchdeq "


def import_original(checkout: Path) -> Any:
    """The module of its language model, and of its solvers."""
    if not torch.cuda.is_available():
        torch.cuda.synchronize = lambda device=None: None
    torch.solve = lambda b, a: (torch.linalg.solve(a, b), None)  # type: ignore[attr-defined]
    if "termcolor" not in sys.modules:
        termcolor = types.ModuleType("termcolor")
        termcolor.colored = lambda text, *_: text  # type: ignore[attr-defined]
        sys.modules["termcolor"] = termcolor
    with importing("original", [checkout / "DEQ-Sequence", checkout]):
        import lib.solvers as solvers  # pyright: ignore[reportMissingImports]
        from models.deq_transformer import DEQTransformerLM  # pyright: ignore[reportMissingImports]
    return types.SimpleNamespace(lm=DEQTransformerLM, solvers=solvers)


class Original(Side):
    """The model with its own solvers, its own optimizer and the order of its own training loop."""

    name = "original"

    def __init__(self, checkout: Path, shape: Shape, torchdeq_solvers: Any = None) -> None:
        code = import_original(checkout)
        self.solvers, self.torchdeq_solvers = code.solvers, torchdeq_solvers
        self.shape = shape
        self.model = code.lm(
            shape.vocab, 2, 24, shape.n_head, shape.d_model, shape.d_model // shape.n_head, shape.d_inner, shape.dropout,
            0.0, d_embed=shape.d_model, div_val=shape.div_val, tie_projs=[False] + [True] * len(shape.cutoffs),
            cutoffs=list(shape.cutoffs), tgt_len=shape.length, mem_len=shape.memory, pretrain_steps=0,
        )  # fmt: skip
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.0)
        self.found: Found | None = None

    @torch.no_grad()
    def load(self, ours: dict[str, Tensor]) -> None:
        """Take our model's parameters."""
        taken = set()
        for name, tensor in self.model.state_dict().items():
            for mine in translate({name: tensor}):
                if mine in ours:
                    tensor.copy_(ours[mine].view_as(tensor))
                    taken.add(mine)
        if missing := {name for name, tensor in ours.items() if tensor.is_floating_point()} - taken:
            raise ValueError(f"the original has no place for {sorted(missing)}")

    def use(self, forward: Solve, backward: Solve) -> None:
        self.model.f_solver = self._forward(self._solver(forward))
        self.model.b_solver = self._solver(backward)

    def _solver(self, solve: Solve) -> Callable[..., dict[str, Tensor]]:
        if solve.method.startswith(THEIRS):
            return self._torchdeq(solve)
        method = getattr(self.solvers, solve.method.removeprefix(MINE))
        # Broyden evaluates f once more than its threshold says, Anderson as often.
        threshold = solve.evaluations - solve.method.endswith("broyden")
        return lambda f, x0, **kwargs: method(f, x0, **{**kwargs, "threshold": threshold, "eps": 0.0})

    def _torchdeq(self, solve: Solve) -> Callable[..., dict[str, Tensor]]:
        name = solve.method.removeprefix(THEIRS)
        method = getattr(self.torchdeq_solvers, name)
        options = {"max_iter": solve.evaluations - (name == "broyden_solver"), "tol": 0.0, "stop_mode": "rel"}

        def solver(f: Any, x0: Tensor, **_: Any) -> dict[str, Tensor]:
            # As its own `hook_ift` does: states are flat.
            z, _, _ = method(lambda z: f(z.view_as(x0)).reshape(len(x0), -1), x0.reshape(len(x0), -1), **options)
            return {"result": z.view_as(x0)}

        return solver

    def _forward(self, method: Callable[..., dict[str, Tensor]]) -> Callable[..., dict[str, Tensor]]:
        def solver(f: Any, x0: Tensor, **kwargs: Any) -> dict[str, Tensor]:
            result = method(f, x0, **kwargs)
            if self.found is not None:
                z = f(result["result"]) if self.model.training else result["result"]  # training evaluates f once more
                self.found.z = z.detach().transpose(1, 2)
                self.found.f = lambda z: f(z.transpose(1, 2)).transpose(1, 2)
            return result

        return solver

    def memory(self, z: Tensor, u: Tensor) -> list[Tensor]:
        return [z.transpose(0, 1).contiguous(), u.transpose(0, 1).contiguous()]

    def loss(self, batch: Batch) -> Tensor:
        loss, *_ = self.model(
            batch.tokens.t().contiguous(), batch.targets.t().contiguous(), list(batch.memory), compute_jac_loss=False
        )
        return loss.float().mean()

    def loss_at(self, z: Tensor, batch: Batch) -> Tensor:
        return self.model.crit(z.transpose(0, 1).flatten(0, 1), batch.targets.t().flatten()).float().mean()

    @contextmanager
    def watched(self) -> Iterator[Found]:
        self.found = Found()
        try:
            yield self.found
        finally:
            self.found = None

    def gradients(self) -> dict[str, Tensor]:
        return through_equilibrium(translate({n: p.grad for n, p in self.model.named_parameters() if p.grad is not None}))
