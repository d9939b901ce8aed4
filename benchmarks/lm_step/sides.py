"""The models of a comparison, with the weights and the text of one run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from lm_step.original import Original
from lm_step.ours import Ours, parameters_of, states
from lm_step.shape import Batch, Shape, Solve
from lm_step.torchdeq_lm import TorchDEQ, import_torchdeq
from lm_step.ways import IN_ORIGINAL, ORIGINAL, OURS, TORCHDEQ, Reference, Way, ways
from torch import Tensor

from equilibria import Implicit, Stopping
from equilibria.models import Memory

FIRST = 100
"""Segment of the training text that the memory begins with."""


def shape_of(run: Any) -> Shape:
    """The size of a run's model, without dropout."""
    model, optim = run.config.model, run.config.optim
    return Shape(
        d_model=model.d_model, n_head=model.n_head, d_inner=model.d_inner, vocab=run.tokenizer.size, batch=optim.batch_size,
        length=optim.length, memory=model.mem_len, cutoffs=tuple(model.cutoffs), div_val=model.div_val,
    )  # fmt: skip


class Sides:
    """Our model, the original and TorchDEQ's, and what each of them reads.

    Ours and the original have the weights of the run; TorchDEQ's, which is another function, is drawn at random.
    """

    def __init__(self, deq: Path, torchdeq: Path, run: Any, data_dir: Path | None, *, dropout: float = 0.0) -> None:
        torch.manual_seed(0)
        self.shape = shape = dataclasses.replace(shape_of(run), dropout=dropout)
        self.weights: dict[str, Tensor] = parameters_of(run)
        code = import_torchdeq(torchdeq)
        self.ours, self.original, self.torchdeq = Ours(shape), Original(deq, shape, code.solvers), TorchDEQ(code, shape)
        self.ours.model.load_state_dict(self.weights)
        self.original.load(self.weights)
        for name, parameter in self.torchdeq.model.named_parameters():
            if ".ln" not in name and not name.endswith(".bias"):
                torch.nn.init.normal_(parameter, std=0.2 if name.startswith("injection") else 0.02)
        batches = run.corpus(data_dir).train.batches(shape.batch, shape.length, "cpu")
        count = -(-shape.memory // shape.length)
        self.ours.solve_to("anderson", Stopping(rtol=1e-4, max_evals=100), Implicit())
        self.past: Memory = states(self.ours, [batches[FIRST + i] for i in range(count)], shape.memory)
        self.tokens, self.targets = batches[FIRST + count]

    def batch(self, side: Any) -> Batch:
        """The segment, with the memory in the form of this side."""
        return Batch(self.tokens, self.targets, side.memory(*self.past))

    def reference(self) -> Reference:
        """The gradients at an equilibrium, had from ours in float32 with a converged backward solve."""
        batch = self.batch(self.ours)
        return lambda z: self.ours.implicit_gradient(batch, z)

    def agree(self) -> dict[str, float]:
        """How far f and the loss of ours and of the original are from each other at one and the same state."""
        batches = [self.batch(side) for side in (self.ours, self.original)]
        self.ours.use(Solve("anderson", 60), Solve("gmres", 1))
        self.original.use(Solve("original anderson", 3), Solve("original anderson", 3))
        found, theirs = (side.look(b, training=False) for side, b in zip((self.ours, self.original), batches, strict=True))
        z = found.state
        a, b = found.map(z), theirs.map(z)
        with torch.no_grad():
            c, d = (float(s.loss_at(z, x)) for s, x in zip((self.ours, self.original), batches, strict=True))
        error = {"f": float((a - b).norm() / b.norm()), "loss": abs(c - d) / d, "residual": found.residual}
        if error["f"] > 1e-5 or error["loss"] > 1e-5:
            raise RuntimeError(f"ours and the original do not compute the same: {error}")
        return error

    def at_equal_evaluations(self, evaluations: int) -> list[Way]:
        """All of each library, TorchDEQ with its own model."""
        return [
            *ways("equilibria", self.ours, self.batch(self.ours), [OURS[0]], evaluations),
            *ways("original", self.original, self.batch(self.original), ORIGINAL, evaluations),
            *ways("torchdeq", self.torchdeq, self.batch(self.torchdeq), TORCHDEQ, evaluations),
        ]

    def at_equal_residual(self, tol: float) -> list[Way]:
        """All that solve the same function: ours, the original, and TorchDEQ's solvers in the original's model."""
        ours = ways("equilibria", self.ours, self.batch(self.ours), OURS, 1)
        resting = dataclasses.replace(ours[0], forward=ours[0].forward._replace(tol=tol))
        theirs = self.batch(self.original)
        return [
            *ours,
            resting,
            *ways("original", self.original, theirs, ORIGINAL, 1),
            *ways("torchdeq", self.original, theirs, IN_ORIGINAL, 1),
        ]
