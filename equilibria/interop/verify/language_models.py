"""A language model read as the original read it: segments in a row, one training step, a trace of Broyden's method."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from equilibria.adjoints import Implicit
from equilibria.interop.original.names import translate
from equilibria.interop.verify.cases import Case, Recorded
from equilibria.interop.verify.draws import Normals
from equilibria.interop.verify.report import Report, relative
from equilibria.interop.verify.tolerances import Limits
from equilibria.models.language_model import EquilibriumLM, LMOutput
from equilibria.solution import Stats
from equilibria.solvers import GMRES, Broyden
from equilibria.stopping import Stopping

M = TypeVar("M", bound=EquilibriumLM)

BUDGET = 1000
"""Evaluations of a solve that is to be tight."""
FLOOR, FLOOR_BUDGET = 2e-7, 300
"""Relative residual at which solves in float32 may stop; many rest above it, and spend their budget."""


def prepare(model: M, state: Mapping[str, Tensor], dtype: torch.dtype, limits: Limits) -> M:
    """A model with these parameters, whose solves go to the residual demanded, or to the floor of float32.

    Broyden's method remembers all its steps, as the original's does, so that it finds the same equilibrium.
    """
    model.double().load_state_dict(state)
    tight = bool(limits["how"])
    rtol, budget = (0.5 * limits["how"][0], BUDGET) if tight else (FLOOR, FLOOR_BUDGET)
    stopping = Stopping(rtol=rtol, atol=0.0, max_evals=budget)
    model.deq.solver, model.deq.stopping = Broyden(history=300), stopping
    model.deq.adjoint = Implicit(solver=GMRES(), stopping=stopping)
    model.deq.raise_nonfinite = tight
    return model.to(dtype)


def recorded_state(case: Case) -> dict[str, Tensor]:
    """The parameters by our names, from all the names that the original's state dict gives them."""
    stored = case.tensors("state")
    return translate({key: stored[name] for key, name in case.config["state_dict_keys"].items()})


@dataclass
class Reading:
    """A model, and the case that it is to reproduce."""

    model: EquilibriumLM
    case: Case
    dtype: torch.dtype
    limits: Limits
    report: Report
    fields: tuple[str, ...]
    """The original's names of the parts of a memory."""
    decoded: bool = True
    """Whether the original's model returns scores of words; otherwise what its softmax reads."""

    # Evaluation

    @torch.no_grad()
    def evaluate(self, kind: str, *, depth: int | None = None, subseq_len: int | None = None, file: str = "eval") -> None:
        """Segments in a row, each with the memory of the one before, as recorded in a file under `kind`."""
        recorded = self.case.tensors(file, self.dtype)
        model = self.with_pieces(subseq_len).eval()
        memory, segment = None, 0
        while f"{kind}nll.{segment}" in recorded:
            tokens, targets = self.segment(recorded, segment)
            with states_of(model) as states:
                out = model(tokens, targets, memory, depth=depth)
            memory = out.memory
            self._losses(kind, recorded, segment, out.nll, targets, depth)
            if f"{kind}zstar.{segment}" in recorded:
                (limit,) = self.limits["zstar"]
                theirs = recorded[f"{kind}zstar.{segment}"]
                self.report.relative(f"{kind}zstar", states[0].mT, theirs, limit, f"segment {segment}")
            if f"{kind}output.{segment}" in recorded:
                self._outputs(kind, states[0], recorded[f"{kind}output.{segment}"], segment)
            self._memory(f"{kind}mem", memory, recorded, kind, f".{segment}")
            self._solves(f"{kind}solves", out.stats)
            segment += 1
        if segment == 0:
            self.report.exact(f"{kind}nll", False, f"{file} holds no {kind}nll.0")

    def _losses(self, kind: str, recorded: Recorded, segment: int, nll: Tensor, targets: Tensor, depth: int | None) -> None:
        where = f"segment {segment}"
        limit = self._nll_limit(depth)
        self.report.largest(f"{kind}nll", nll.T, recorded[f"{kind}nll.{segment}"], limit, where)
        by_cluster = f"{kind}nll_cluster_order.{segment}"
        if by_cluster in recorded:
            order = self.model.softmax.cluster_order(targets.T)
            ours = nll.T.flatten()[order].view_as(nll.T)
            self.report.largest(f"{kind}nll_cluster_order", ours, recorded[by_cluster], limit, where)
        if f"{kind}loss.{segment}" in recorded:
            (limit,) = self.limits["loss"]
            self.report.largest(f"{kind}loss", nll.mean(), recorded[f"{kind}loss.{segment}"], limit, where)

    def _outputs(self, kind: str, z: Tensor, theirs: Tensor, segment: int) -> None:
        """Of the first steps: logits, up to the constant that a softmax cannot see, log-probabilities, or what it reads."""
        ours = self.model.output(z)[:, : len(theirs)].transpose(0, 1)  # (steps, B, channels)
        if self.decoded:
            ours, theirs = self.model.softmax.log_prob(ours).log_softmax(-1), theirs.log_softmax(-1)
        self.report.largest(f"{kind}output", ours, theirs, self.limits["nll"][0], f"segment {segment}")

    # Training

    def train(
        self, file: str, segment: int, *, depth: int | None = None, subseq_len: int | None = None, kind: str = "full."
    ) -> LMOutput:
        """One step on a segment, with the recorded memory of the segment before: loss, memory, gradients, the state."""
        evaluation, recorded = self.case.tensors("eval", self.dtype), self.case.tensors(file, self.dtype)
        model = self.with_pieces(subseq_len).train()
        tokens, targets = self.segment(evaluation, segment)
        memory = self.recorded_memory(evaluation, kind, segment - 1)
        with states_of(model) as states:
            out = model(tokens, targets, memory, depth=depth)
        loss = out.nll.mean()
        self._gradients(f"{file}.grad", loss, recorded.under("grad."), depth)
        self.report.largest(f"{file}.loss", loss, recorded["loss"], self.limits["loss"][0])
        if "nll" in recorded:
            self.report.largest(f"{file}.nll", out.nll.T, recorded["nll"], self._nll_limit(depth))
        if "zstar" in recorded:
            self.report.relative(f"{file}.zstar", states[0].mT, recorded["zstar"], self.limits["zstar"][0])
        self._memory(f"{file}.mem", out.memory, recorded, "", "")
        self._solves(f"{file}.solves", out.stats)
        return out

    def train_jacobian(self, file: str, segment: int, *, kind: str = "") -> None:
        """The Jacobian loss for a recorded vector, and its gradient with the state held constant."""
        evaluation, recorded = self.case.tensors("eval", self.dtype), self.case.tensors(file, self.dtype)
        model = self.with_pieces(None).train()
        with Normals(recorded["jac_vector"].mT):  # (B, L, d), as our states are
            out = model(
                *self.segment(evaluation, segment), self.recorded_memory(evaluation, kind, segment - 1), jacobian=True
            )
        assert out.jacobian is not None
        (limit,) = self.limits["loss"]
        for key in ("jac_loss", "jac_loss_shape_1x1"):
            if key in recorded:
                self.report.largest(f"{file}.{key}", out.jacobian.reshape(recorded[key].shape), recorded[key], limit)
        self._gradients(f"{file}.grad_jac", out.jacobian, recorded.under("grad_jac."), None)

    def _gradients(self, quantity: str, loss: Tensor, theirs: Mapping[str, Tensor], depth: int | None) -> None:
        """Of each parameter once. Where the original has two parameters for what is one here, their gradients add up."""
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        expected: dict[int, Tensor] = {}
        for name, gradient in translate(theirs).items():
            key = id(parameters[name])
            expected[key] = expected[key] + gradient if key in expected else gradient
        each, together = self.limits["grad.*"] if depth is None else (self.limits["stacked_*/pretrain (no solver)"][1],) * 2
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        ours = torch.autograd.grad(loss, list(self.model.parameters()), materialize_grads=True)
        # The original gives no gradient to a cluster without a target: what is not recorded is zero.
        recorded = [expected.get(id(p), torch.zeros_like(p)) for p in self.model.parameters()]
        for name, gradient, their in zip(names.values(), ours, recorded, strict=True):
            if gradient.shape != their.shape:
                self.report.exact(
                    f"{quantity} of each", False, f"{name}: {tuple(gradient.shape)}, not {tuple(their.shape)}"
                )
                return
        everything = torch.cat([gradient.flatten() for gradient in recorded])
        self.report.relative(f"{quantity} of all", torch.cat([g.flatten() for g in ours]), everything, together)
        # A gradient that is zero but for rounding has no relative error: ten times the rounding of all is the limit.
        rounding = float(torch.finfo(everything.dtype).eps * everything.norm())
        for name, gradient, their in zip(names.values(), ours, recorded, strict=True):
            error = relative(gradient, their)
            if 0.0 < float(their.norm()) <= rounding:
                error = each * float((gradient - their).norm()) / (10 * rounding)
            self.report.add(f"{quantity} of each", error, each, name)

    # Parts

    def with_pieces(self, subseq_len: int | None) -> EquilibriumLM:
        self.model.config = replace(self.model.config, subseq_len=subseq_len)
        return self.model

    def segment(self, recorded: Recorded, segment: int) -> tuple[Tensor, Tensor]:
        return recorded[f"data.{segment}"].T, recorded[f"target.{segment}"].T  # (B, L)

    def _nll_limit(self, depth: int | None) -> float:
        return self.limits["nll" if depth is None else "stacked_*/pretrain (no solver)"][0]

    def recorded_memory(self, recorded: Recorded, kind: str, segment: int) -> Any:
        """The memory after a segment; None before the first."""
        if segment < 0:
            return None
        parts = [recorded[f"{kind}{name}.{segment}"].transpose(0, 1) for name in self.fields]
        return type(self.model.empty_memory(1))(*parts)

    def _memory(self, quantity: str, memory: Any, recorded: Recorded, kind: str, suffix: str) -> None:
        (limit,) = self.limits["mem_*"]
        for name, ours in zip(self.fields, memory, strict=True):
            if f"{kind}{name}{suffix}" in recorded:
                theirs = recorded[f"{kind}{name}{suffix}"]
                self.report.relative(quantity, ours.transpose(0, 1), theirs, limit, f"{name}{suffix}")

    def _solves(self, quantity: str, stats: list[Stats]) -> None:
        """Whether every solve, forward and backward, has got to the residual demanded."""
        for solve in stats:
            for one, way in ((solve, "forward"), *((back, "backward") for back in solve.backward)):
                for limit in self.limits["how"]:
                    self.report.add(quantity, float(one.relative.max()), limit, way)


@contextmanager
def states_of(model: EquilibriumLM) -> Iterator[list[Tensor]]:
    """Collects the states z (B, L, d) that the softmax is about to read."""
    states: list[Tensor] = []
    read = model.output

    def output(z: Tensor) -> Tensor:
        states.append(z.detach())
        return read(z)

    model.output = output
    try:
        yield states
    finally:
        del model.output
