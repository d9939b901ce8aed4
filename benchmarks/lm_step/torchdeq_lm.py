"""The language model of TorchDEQ's zoo (deq-zoo/deq-lm), run from a checkout of it."""

from __future__ import annotations

import types
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lm_step.checkouts import importing
from lm_step.shape import Batch, Found, Shape, Side, Solve
from torch import Tensor

BACKWARD = ("ift", "hook_ift", "unrolled", "checkpointed")


class TorchDEQ(Side):
    """The model under each of TorchDEQ's ways to differentiate.

    Its block is pre-norm, with an affine layer norm in three places: the sizes are the others', not the function.
    The method of the backward solve names the way: "ift SOLVER" or "hook_ift SOLVER", by the implicit function theorem;
    "unrolled", as its own script trains, which differentiates every step, from the first on; "checkpointed", the same with
    its recomputation.
    """

    name = "torchdeq"

    def __init__(self, code: Any, shape: Shape) -> None:
        self.code, self.shape = code, shape
        self.args = Namespace(mem=False, core="indexing", gamma=0.8, grad=[1])
        self.model = self.code.lm(
            self.args, shape.vocab, 1, shape.n_head, shape.d_model, shape.d_model // shape.n_head, shape.d_inner,
            shape.dropout, 0.0, d_embed=shape.d_model, div_val=shape.div_val, mem_len=shape.memory, tgt_len=shape.length,
            tie_projs=[False] + [True] * len(shape.cutoffs), cutoffs=list(shape.cutoffs),
        )  # fmt: skip
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.0)

    def use(self, forward: Solve, backward: Solve) -> None:
        way, _, method = backward.method.partition(" ")
        unrolled = way in ("unrolled", "checkpointed")
        self.model.func.mem = way == "checkpointed"
        kwargs: dict[str, Any] = {
            "core": "indexing",
            "f_solver": forward.method,
            "f_max_iter": 0 if unrolled else _iterations(forward.method, forward.evaluations),
            "eval_f_max_iter": _iterations(forward.method, forward.evaluations),
            "f_tol": 0.0,
            "f_stop_mode": "rel",
            "b_solver": method or "fixed_point_iter",
            "b_max_iter": _iterations(method, backward.evaluations),
            "b_tol": 0.0,
            "b_stop_mode": "rel",
            "ift": way == "ift",
            "hook_ift": way == "hook_ift",
            "grad": [forward.evaluations] if unrolled else [1],
            "gamma": 0.8,
        }
        self.args.grad = kwargs["grad"]
        self.model.deq = self.code.get_deq(Namespace(**kwargs))

    def memory(self, z: Tensor, u: Tensor) -> list[Tensor]:
        return [z.contiguous(), u.contiguous()]

    def loss(self, batch: Batch) -> Tensor:
        loss, _, _ = self.model(batch.tokens, batch.targets, list(batch.memory))
        return loss.float().mean()

    def loss_at(self, z: Tensor, batch: Batch) -> Tensor:
        return self.model.crit(z, batch.targets).float().mean()

    @contextmanager
    def watched(self) -> Iterator[Found]:
        found, deq = Found(), self.model.deq

        def forward(f: Any, z: Tensor, **kwargs: Any) -> Any:
            found.f = f
            states, info = type(deq).forward(deq, f, z, **kwargs)
            found.z = states[-1].detach()
            return states, info

        deq.forward = forward
        try:
            yield found
        finally:
            del deq.forward

    def gradients(self) -> dict[str, Tensor]:
        names = ("func.", "injection.")
        return {n: p.grad for n, p in self.model.named_parameters() if p.grad is not None and n.startswith(names)}


def _iterations(method: str, evaluations: int) -> int:
    return evaluations - (method == "broyden")


def import_torchdeq(checkout: Path) -> Any:
    """The class of its language model, what makes its solvers, and these."""
    with importing("zoo", [checkout / "deq-zoo" / "deq-lm", checkout]):
        import torchdeq.solver as solvers  # pyright: ignore[reportMissingImports]
        from models.deq_transformer import DEQTransformerLM, get_deq  # pyright: ignore[reportMissingImports]
    return types.SimpleNamespace(lm=DEQTransformerLM, get_deq=get_deq, solvers=solvers)
