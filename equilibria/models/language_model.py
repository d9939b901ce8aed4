"""What the language models at equilibrium have in common: how they read a segment of text."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from equilibria.nn.computed_once import computed_once
from equilibria.nn.deq import DEQ
from equilibria.nn.stack import stack
from equilibria.regularizers import jacobian_loss
from equilibria.solution import Stats


@dataclass(frozen=True, kw_only=True)
class LMShape:
    """What language models at equilibrium are like, whatever their block and whatever they read."""

    weight_norm: bool = False
    """Weight norm on the linear maps of the block."""
    tie_weights: bool = True
    """The softmax scores a word by the vector that embeds it."""
    cutoffs: tuple[int, ...] = ()
    """First ids of the clusters of rarer words, for an adaptive softmax; none for the plain one."""
    subseq_len: int | None = None
    """Solve a segment in pieces of this length, in order; None for the whole segment at once. A stack takes it whole."""
    depth: int | None = None
    """Number of layers of the explicit twin, weights tied; None for the equilibrium."""

    def __post_init__(self) -> None:
        self._check_counts(subseq_len=1, depth=1)
        if any(left >= right for left, right in pairwise((0, *self.cutoffs))):
            raise ValueError(f"cutoffs is {self.cutoffs}; give rising numbers from 1 on")

    def _check_counts(self, **lowest: int) -> None:
        for name, least in lowest.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}; give {least} or more")

    def _check_positive(self, *names: str) -> None:
        for name in names:
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; give a finite number above 0")


@dataclass(frozen=True, kw_only=True)
class LMConfig(LMShape):
    """A shape, and the size of the vocabulary."""

    vocab_size: int
    """Number of tokens."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_counts(vocab_size=1)


class LMOutput(NamedTuple):
    """What a forward pass over a segment returns."""

    nll: Tensor
    """(B, L) negative log-likelihood of each target, nats."""
    memory: Any
    """What the next segment is to be given: a NamedTuple of detached tensors, batch first."""
    stats: list[Stats]
    """One entry per solved subsequence, in order; empty where the explicit stack was applied."""
    jacobian: Tensor | None = None
    """Estimate of ‖J‖²_F per entry of the state (see `jacobian_loss`), where it was asked for."""


class Reading(NamedTuple):
    """What reading a segment gives, before the softmax."""

    z: Tensor
    """(B, L, d) the states."""
    memory: Any
    """As of `LMOutput`, and so are the others."""
    stats: list[Stats]
    jacobian: Tensor | None


class Extension(NamedTuple):
    """What adding tokens to a text gives."""

    z: Tensor
    """(B, n, d) states of the new positions."""
    cache: Any
    """What the next ones need of all positions: a NamedTuple with a method `rows(index)`, which picks samples."""
    stats: Stats | None
    """Of the solve; None of an explicit stack."""


class EquilibriumLM(nn.Module, ABC):
    """A language model whose one layer is solved for its equilibrium: z* = f(z*; u, memory), p(next) = softmax(z*).

    A segment (B, L) of words becomes an injection u (B, L, C), the block is solved for states z (B, L, d), and a softmax
    reads the states. The model carries a memory from segment to segment, without gradient.

    With `config.subseq_len` a segment is solved in pieces, in order. The first piece sees the memory, each later one sees
    the piece before it and nothing earlier; gradients flow from piece to piece.

    The explicit twin is the same model with the block applied `config.depth` times from z = 0 to the whole segment. It has
    the same parameters under the same names, so a state dict fits both.

    A model has the attributes `config`, `deq` (a `DEQ` around its block) and `softmax` (a head such as
    `equilibria.nn.AdaptiveSoftmax`), and the methods below that are abstract.

    Source: Bai, Kolter & Koltun, "Deep Equilibrium Models", NeurIPS 2019, section 3.3.
    """

    config: Any
    deq: DEQ
    softmax: Any

    @property
    def block(self) -> Any:
        """f, the layer that is solved or stacked."""
        return self.deq.block

    @abstractmethod
    def injection(self, tokens: Tensor) -> Tensor:
        """u (B, L, C) of tokens (B, L)."""

    @abstractmethod
    def draw_masks(self, injection: Tensor) -> Any:
        """The masks of one forward pass, for all its pieces."""

    @abstractmethod
    def block_inputs(self, injection: Tensor, past: Any, masks: Any) -> tuple[Any, ...]:
        """What the block's `prepare` takes."""

    @abstractmethod
    def past(self, z: Tensor, injection: Tensor) -> Any:
        """What the next piece of a segment sees of this one: as a memory, but with its graph."""

    @abstractmethod
    def remember(self, memory: Any, z: Tensor, injection: Tensor) -> Any:
        """What the next segment sees of this one."""

    @abstractmethod
    def empty_memory(self, batch: int) -> Any:
        """The memory at the start of a text."""

    @abstractmethod
    def check_memory(self, memory: Any, batch: int) -> None:
        """Raise ValueError or TypeError where the memory is not one for `batch` sequences."""

    @abstractmethod
    def output(self, z: Tensor) -> Tensor:
        """What the softmax reads of states z (B, L, d)."""

    @property
    def window(self) -> int | None:
        """How many positions one position sees in a text that grows, itself included; None for all."""
        return None

    @abstractmethod
    def extend(self, tokens: Tensor, cache: Any, window: int | None = None, padding: Tensor | None = None) -> Extension:
        """Add n further tokens (B, n) to a text of which the cache is known; None is the empty cache.

        The map is causal: what is known of the tokens so far does not change when others follow.

        Args:
            window: how many positions one position sees, itself included; None for all.
            padding: (B,) int64, how many of the first of these tokens are no text, where texts of several lengths end
                together; above 0 only where all before them was padding. None for none.
        """

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor,
        memory: Any = None,
        *,
        depth: int | None = None,
        jacobian: bool = False,
    ) -> LMOutput:
        """Loss of each target.

        Args:
            tokens: (B, L) int64.
            targets: (B, L) int64, usually the tokens one position later.
            memory: of the segment before; None at the start of a text.
            depth: apply the block this many times instead of solving, e.g. to warm up; None for `config.depth`.
            jacobian: also return the Jacobian loss at the equilibrium (a stack has none).
        """
        _check_segment(tokens, targets)
        z, memory, stats, penalty = self.read(tokens, memory, depth=depth, jacobian=jacobian)
        return LMOutput(self.softmax(self.output(z), targets), memory, stats, penalty)

    def read(self, tokens: Tensor, memory: Any = None, *, depth: int | None = None, jacobian: bool = False) -> Reading:
        """The states of a segment, for `output` and the softmax; the arguments are those of `forward`."""
        if memory is None:
            memory = self.empty_memory(tokens.shape[0])
        self.check_memory(memory, tokens.shape[0])
        depth = self.config.depth if depth is None else depth
        stats: list[Stats] = []
        penalty = None
        with computed_once(self):  # weights, and the masks of those that are dropped, are those of the whole segment
            injection = self.injection(tokens)
            masks = self.draw_masks(injection)
            if depth is None:
                z, stats, penalty = self._solve(injection, memory, masks, jacobian)
            else:
                z = stack(self.block, depth, *self.block_inputs(injection, memory, masks))
            with torch.no_grad():
                memory = self.remember(memory, z, injection)
        return Reading(z, memory, stats, penalty)

    def log_prob(self, z: Tensor) -> Tensor:
        """(B, L, V) log-probabilities of the next word, for states z (B, L, d)."""
        return self.softmax.log_prob(self.output(z))

    def _solve(
        self, injection: Tensor, memory: Any, masks: Any, jacobian: bool
    ) -> tuple[Tensor, list[Stats], Tensor | None]:
        pieces: list[Tensor] = []
        stats: list[Stats] = []
        penalties: list[Tensor] = []
        past = memory
        for u in injection.split(self.config.subseq_len or injection.shape[1], dim=1):
            inputs = self.block_inputs(u, past, masks)
            args = self.block.prepare(*inputs)
            z, solved = self.deq.solve(self.block.initial(*inputs), *args)
            if jacobian:
                penalties.append(jacobian_loss(self.block, z, *args))
            pieces.append(z)
            stats.append(solved)
            past = self.past(z, u)
        penalty = torch.stack(penalties).mean() if penalties else None
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1), stats, penalty


def rolled(x: Tensor, shift: Tensor) -> Tensor:
    """x (B, n, ...) with each sample moved to the left by its shift (B,); what leaves comes in again at the other end."""
    index = (torch.arange(x.shape[1], device=x.device) + shift[:, None]) % x.shape[1]
    return x[torch.arange(len(x), device=x.device)[:, None], index]


def _check_segment(tokens: Tensor, targets: Tensor) -> None:
    if tokens.dim() != 2 or tokens.numel() == 0:
        raise ValueError(f"tokens have shape {tuple(tokens.shape)}; give (batch, length), neither of them 0")
    if targets.shape != tokens.shape:
        raise ValueError(f"targets have shape {tuple(targets.shape)}, tokens {tuple(tokens.shape)}; they must agree")
