"""What the language models of a comparison have in common: their size, what they read, how they take a step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One size of model and batch; the same for all sides."""

    d_model: int
    n_head: int
    d_inner: int
    vocab: int
    batch: int
    length: int
    memory: int
    dropout: float = 0.0
    cutoffs: tuple[int, ...] = ()
    div_val: int = 1


class Solve(NamedTuple):
    """How one side solves: its name for the method, and the evaluations of f, or products, that it spends."""

    method: str
    evaluations: int
    tol: float = 0.0
    """The relative residual at which ours lets a sample rest; 0 to spend all, as the others do."""


class Batch(NamedTuple):
    """Tokens and targets (B, L), and the memory in the side's own form."""

    tokens: Tensor
    targets: Tensor
    memory: Any


@dataclass
class Found:
    """What the solve of one step found, for the harness to check."""

    z: Tensor | None = None
    """(B, L, d) the state that the loss was computed from."""
    f: Callable[[Tensor], Tensor] | None = None
    """The map that was solved, on (B, L, d)."""

    def map(self, z: Tensor) -> Tensor:
        """f(z)."""
        assert self.f is not None
        with torch.no_grad():
            return self.f(z)

    @property
    def state(self) -> Tensor:
        """z, which was found."""
        assert self.z is not None
        return self.z

    @property
    def residual(self) -> float:
        """The largest relative residual of a sample."""
        return float(relative(self.map(self.state), self.state).max())


class Side(ABC):
    """One language model, its optimizer, and how it is trained."""

    name: str
    model: Any
    """An nn.Module; whose, differs from side to side."""
    optimizer: torch.optim.Optimizer

    @abstractmethod
    def use(self, forward: Solve, backward: Solve) -> None:
        """Solve so from now on."""

    @abstractmethod
    def memory(self, z: Tensor, u: Tensor) -> Any:
        """The memory whose states are z (B, M, d) and injections u (B, M, 3d)."""

    @abstractmethod
    def loss(self, batch: Batch) -> Tensor:
        """The mean loss of a segment."""

    @abstractmethod
    def loss_at(self, z: Tensor, batch: Batch) -> Tensor:
        """The same, were the states z (B, L, d)."""

    @abstractmethod
    @contextmanager
    def watched(self) -> Iterator[Found]:
        """Note what the solve of the next loss finds."""
        yield Found()

    @abstractmethod
    def gradients(self) -> dict[str, Tensor]:
        """Those of the block and the injection, which come through the equilibrium; the original's by our names."""

    def step(self, batch: Batch) -> float:
        """One training step; the loss."""
        self.model.train()
        self.model.zero_grad()
        loss = self.loss(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 0.25)
        self.optimizer.step()
        return loss.item()

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> float:
        """The loss of a segment, without gradients."""
        self.model.eval()
        return self.loss(batch).item()

    def look(self, batch: Batch, *, training: bool) -> Found:
        """What the solve of a step finds."""
        self.model.train(training)
        with self.watched() as found, torch.set_grad_enabled(training):
            self.loss(batch)
        return found

    def differentiate(self, batch: Batch) -> dict[str, Tensor]:
        """The gradients of a training step."""
        self.model.train()
        self.model.zero_grad()
        self.loss(batch).backward()
        return {name: gradient.detach().double().clone() for name, gradient in self.gradients().items()}


def relative(fz: Tensor, z: Tensor) -> Tensor:
    """(B,) ‖f(z) - z‖ / ‖f(z)‖ of each sample, in float64."""
    fz, z = fz.detach().double().flatten(1), z.detach().double().flatten(1)
    return (fz - z).norm(dim=1) / fz.norm(dim=1)


def error_of(gradients: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """‖g - g*‖ / ‖g*‖ over all tensors."""
    if gradients.keys() != exact.keys():
        raise ValueError(f"gradients of {sorted(gradients)} cannot be compared with those of {sorted(exact)}")
    off = sum(float((gradients[name] - exact[name]).square().sum()) for name in exact)
    size = sum(float(g.square().sum()) for g in exact.values())
    return (off / size) ** 0.5
