"""The DEQ-Transformer language model, and its explicit twin."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from equilibria.adjoints import Adjoint
from equilibria.models.block import DropoutMasks, Memory, TransformerBlock
from equilibria.nn.deq import DEQ
from equilibria.nn.dropout import FrozenDropout
from equilibria.nn.stack import stack
from equilibria.regularizers import jacobian_loss
from equilibria.solution import Stats
from equilibria.solvers import Solver
from equilibria.stopping import Stopping


@dataclass(frozen=True, kw_only=True)
class TransformerShape:
    """What a `DEQTransformerLM` is like, whatever it reads."""

    d_model: int = 128
    """Width of the state at each position; even, and a multiple of n_head."""
    n_head: int = 4
    """Attention heads."""
    d_inner: int = 512
    """Hidden width of the feed-forward part."""
    mem_len: int = 64
    """Positions of earlier segments that a segment sees; 0 for none."""
    dropout: float = 0.0
    """Probability of dropping a unit, with one mask per forward pass, shared over time."""
    pre_norm: bool = False
    """Normalise before attention and feed-forward instead of after them."""
    weight_norm: bool = False
    """Weight norm on the linear maps of the block."""
    local_size: int | None = None
    """How many positions one position sees, itself included; None for all of segment and memory."""
    subseq_len: int | None = None
    """Solve a segment in pieces of this length, in order; None for the whole segment at once."""
    depth: int | None = None
    """Number of layers of the explicit twin, weights tied; None for the equilibrium."""
    init_std: float = 0.02
    """Standard deviation of the weights of embedding and block at the start."""
    inject_std: float = 0.2
    """That of the injection, which holds the equilibrium in place: with 0.02 the first solves do not get below a relative
    residual of 1e-2 in 60 evaluations, with 0.2 they do in about 10."""

    def __post_init__(self) -> None:
        for name, lowest in (
            ("d_model", 1),
            ("n_head", 1),
            ("d_inner", 1),
            ("mem_len", 0),
            ("local_size", 1),
            ("subseq_len", 1),
            ("depth", 1),
        ):
            value = getattr(self, name)
            if value is not None and value < lowest:
                raise ValueError(f"{name} is {value}; give {lowest} or more")
        for name in ("init_std", "inject_std"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; give a finite number above 0")


@dataclass(frozen=True, kw_only=True)
class TransformerConfig(TransformerShape):
    """The shape of a `DEQTransformerLM`, and of its vocabulary."""

    vocab_size: int
    """Number of tokens."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.vocab_size < 1:
            raise ValueError(f"vocab_size is {self.vocab_size}; give 1 or more")


class LMOutput(NamedTuple):
    """What a forward pass over a segment returns."""

    nll: Tensor
    """(B, L) negative log-likelihood of each target, nats."""
    memory: Memory
    """The last `mem_len` positions, detached; pass it to the next segment."""
    stats: list[Stats]
    """One entry per solved subsequence, in order; empty where the explicit stack was applied."""
    jacobian: Tensor | None = None
    """Estimate of ‖J‖²_F per entry of the state (see `jacobian_loss`), where it was asked for."""


class DEQTransformerLM(nn.Module):
    """Language model whose one layer is solved for its equilibrium: z* = f(z*; u), p(next) = softmax(E z* + b).

    The embedding E (V, d) is shared: word vectors are sqrt(d) E[token], and u = inject(word) (B, L, 3d) enters queries,
    keys and values of the block (see `TransformerBlock`). Positions are relative and the map is causal. The last
    `mem_len` positions of a segment are the memory of the next one, without gradient.

    With `subseq_len` a segment is solved in pieces, in order. The first piece sees the memory, each later one sees the
    piece before it and nothing earlier; gradients flow from piece to piece.

    The explicit twin is the same model with the block applied `depth` times from z = 0 to the whole segment. It has the
    same parameters under the same names, so a state dict fits both.

    Args:
        config: shape of the model.
        solver, stopping, adjoint, eval_stopping: how the equilibrium is found and differentiated; see `DEQ`.

    Attributes:
        mem_len: length of the memory that `forward` returns. Starts as `config.mem_len`; assign another value at any
            time, e.g. a longer one for evaluation.

    Raises:
        ValueError: a config that makes no model; tokens, targets or memory of shapes that do not fit together.

    Source: Bai, Kolter & Koltun, "Deep Equilibrium Models", NeurIPS 2019, section 3.3. Deliberate differences from the
    released code: dropout on the output is shared over time (there it drops whole positions), `local_size=None` means
    no limit (there 1000 positions), and initialisation reaches weights under weight norm (there it is lost).

    >>> model = DEQTransformerLM(TransformerConfig(vocab_size=100, d_model=32))
    >>> text = torch.randint(100, (2, 9))
    >>> nll, memory, stats, _ = model(text[:, :-1], text[:, 1:])
    >>> nll.shape
    torch.Size([2, 8])
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        solver: Solver[Any] | None = None,
        stopping: Stopping | None = None,
        adjoint: Adjoint | None = None,
        eval_stopping: Stopping | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.mem_len = config.mem_len
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.inject = nn.Linear(config.d_model, 3 * config.d_model)
        block = TransformerBlock(
            config.d_model,
            config.n_head,
            config.d_inner,
            dropout=config.dropout,
            pre_norm=config.pre_norm,
            weight_norm=config.weight_norm,
            init_std=config.init_std,
        )
        self.deq = DEQ(block, solver=solver, stopping=stopping, adjoint=adjoint, eval_stopping=eval_stopping)
        self.output_bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.dropout = FrozenDropout(config.dropout, shared_dims=(1,))
        nn.init.normal_(self.embedding.weight, std=config.init_std)
        nn.init.normal_(self.inject.weight, std=config.inject_std)
        nn.init.zeros_(self.inject.bias)

    @property
    def block(self) -> TransformerBlock:
        """f, the layer that is solved or stacked."""
        block = self.deq.block
        assert isinstance(block, TransformerBlock)
        return block

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor,
        memory: Memory | None = None,
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
        self._check(tokens, targets, memory)
        injection = self.injection(tokens)
        if memory is None:
            memory = self.empty_memory(tokens.shape[0])
        masks = self.block.draw_masks(injection)
        depth = self.config.depth if depth is None else depth
        stats: list[Stats] = []
        penalty = None
        if depth is None:
            z, stats, penalty = self._solve(injection, memory, masks, jacobian)
        else:
            z = stack(self.block, depth, injection, memory, masks, self.config.local_size)
        logits = self.logits(self.dropout(z, self.dropout.mask(z)))
        nll = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
        return LMOutput(nll, self._remember(memory, z, injection), stats, penalty)

    def injection(self, tokens: Tensor) -> Tensor:
        """u (B, L, 3d) of tokens (B, L)."""
        words = self.embedding(tokens) * math.sqrt(self.config.d_model)
        return self.inject(self.dropout(words, self.dropout.mask(words)))

    def logits(self, z: Tensor) -> Tensor:
        """(B, L, V) unnormalised log-probabilities of the next token, for states z (B, L, d)."""
        return F.linear(z, self.embedding.weight, self.output_bias)

    def empty_memory(self, batch: int) -> Memory:
        """The memory at the start of a text: no columns."""
        d, like = self.config.d_model, self.output_bias
        return Memory(like.new_zeros(batch, 0, d), like.new_zeros(batch, 0, 3 * d))

    def _solve(
        self, injection: Tensor, memory: Memory, masks: DropoutMasks, jacobian: bool
    ) -> tuple[Tensor, list[Stats], Tensor | None]:
        pieces: list[Tensor] = []
        stats: list[Stats] = []
        penalties: list[Tensor] = []
        past = memory
        for u in injection.split(self.config.subseq_len or injection.shape[1], dim=1):
            args = self.block.prepare(u, past, masks, self.config.local_size)
            z, solved = self.deq.solve(self.block.initial(u), *args)
            if jacobian:
                penalties.append(jacobian_loss(self.block, z, *args))
            pieces.append(z)
            stats.append(solved)
            past = Memory(z, u)
        penalty = torch.stack(penalties).mean() if penalties else None
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1), stats, penalty

    @torch.no_grad()
    def _remember(self, memory: Memory, z: Tensor, injection: Tensor) -> Memory:
        """The last mem_len columns of [memory; segment]."""
        columns = memory.z.shape[1] + z.shape[1]
        first = max(columns - self.mem_len, 0)
        last_z = torch.cat((memory.z, z), dim=1)[:, first:]
        last_u = torch.cat((memory.u, injection), dim=1)[:, first:]
        return Memory(last_z.contiguous(), last_u.contiguous())

    def _check(self, tokens: Tensor, targets: Tensor, memory: Memory | None) -> None:
        if tokens.dim() != 2 or tokens.numel() == 0:
            raise ValueError(f"tokens have shape {tuple(tokens.shape)}; give (batch, length), neither of them 0")
        if targets.shape != tokens.shape:
            raise ValueError(f"targets have shape {tuple(targets.shape)}, tokens {tuple(tokens.shape)}; they must agree")
        if memory is None:
            return
        batch, d = tokens.shape[0], self.config.d_model
        columns = memory.z.shape[1]
        if memory.z.shape != (batch, columns, d) or memory.u.shape != (batch, columns, 3 * d):
            raise ValueError(
                f"memory has shapes {tuple(memory.z.shape)} and {tuple(memory.u.shape)}, but {batch} sequences of width "
                f"{d} need ({batch}, M, {d}) and ({batch}, M, {3 * d}); pass the memory that the segment before "
                "returned, or None at the start of a text"
            )
