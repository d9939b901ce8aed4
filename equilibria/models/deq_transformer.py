"""The DEQ-Transformer language model, and its explicit twin."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from equilibria.adjoints import Adjoint
from equilibria.models.block import DropoutMasks, KeysValues, Memory, TransformerBlock
from equilibria.models.language_model import EquilibriumLM, Extension, LMConfig, LMShape
from equilibria.models.memory import check_tensors
from equilibria.nn.adaptive_embedding import AdaptiveEmbedding
from equilibria.nn.adaptive_softmax import AdaptiveSoftmax
from equilibria.nn.affine import affine
from equilibria.nn.computed_once import computed_once
from equilibria.nn.deq import DEQ
from equilibria.nn.dropout import FrozenDropout
from equilibria.solvers import Solver
from equilibria.stopping import Stopping


@dataclass(frozen=True, kw_only=True)
class TransformerShape(LMShape):
    """What a `DEQTransformerLM` is like, whatever it reads."""

    d_model: int = 128
    """Width of the state at each position; even, and a multiple of n_head."""
    n_head: int = 4
    """Attention heads."""
    d_inner: int = 512
    """Hidden width of the feed-forward part."""
    d_embed: int | None = None
    """Width of the vectors of the most frequent words; None for d_model."""
    div_val: int = 1
    """Each cluster of rarer words has vectors this many times narrower than the one before."""
    tie_projections: tuple[bool, ...] | None = None
    """Cluster by cluster, whether the softmax shares the embedding's projection to d_model; None: all but the first."""
    mem_len: int = 64
    """Positions of earlier segments that a segment sees; 0 for none."""
    eval_mem_len: int | None = None
    """The same outside training; None: as in training."""
    local_size: int | None = None
    """How many positions one position sees, itself included; None for all of segment and memory."""
    dropout: float = 0.0
    """Probability of dropping a unit, with one mask per forward pass, shared over time."""
    attention_dropout: float = 0.0
    """Probability of dropping an attention weight, with one mask per solve."""
    pre_norm: bool = False
    """Normalise before attention and feed-forward instead of after them."""
    init_std: float = 0.02
    """Standard deviation of the weights of embedding and block at the start."""
    inject_std: float = 0.2
    """That of the injection, which holds the equilibrium in place: with 0.02 the first solves do not get below a relative
    residual of 1e-2 in 60 evaluations, with 0.2 they do in about 10."""
    init_normed: bool = True
    """Whether init_std reaches weights under weight norm. In the released code it does not: there they start as
    U(-1, 1) / sqrt(inputs)."""
    drop_positions: bool = False
    """Let dropout of the output zero whole positions, as in the released code, instead of units."""
    stored_frequencies: bool = False
    """Keep the frequencies of the positions with the parameters, as in the released code: in float64 a checkpoint that was
    saved in float32 computes what it did there only with its own, which are rounded."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_counts(d_model=1, n_head=1, d_inner=1, d_embed=1, div_val=1, mem_len=0, eval_mem_len=0, local_size=1)
        self._check_positive("init_std", "inject_std")


@dataclass(frozen=True, kw_only=True)
class TransformerConfig(TransformerShape, LMConfig):
    """The shape of a `DEQTransformerLM`, and of its vocabulary."""


class AttentionCache(NamedTuple):
    """What the next position of a growing text needs of those before it: the last M columns."""

    layers: tuple[KeysValues, ...]
    """One entry at equilibrium, one for each layer of an explicit twin."""
    padding: Tensor | None = None
    """(B,) how many of the first columns are no text; None for none."""
    distances: Tensor | None = None
    """Of `TransformerBlock.project_distances`, for these columns and more; None to compute them."""

    def rows(self, index: Tensor) -> AttentionCache:
        """The cache of the samples index (N,), which may repeat."""
        layers = tuple(KeysValues(layer.keys[:, index], layer.values[:, index]) for layer in self.layers)
        return self._replace(layers=layers, padding=None if self.padding is None else self.padding[index])


class DEQTransformerLM(EquilibriumLM):
    """Language model whose one layer is a Transformer block at equilibrium: z* = f(z*; u), p(next) = softmax(E z* + b).

    Word vectors are sqrt(d) E[token] (d = d_model), and u = inject(word) (B, L, 3d) enters queries, keys and values of the
    block (see `TransformerBlock`). Positions are relative and the map is causal. The last `mem_len` positions of a segment
    are the memory of the next one, without gradient. How a segment is read, and what the explicit twin is, says
    `EquilibriumLM`; how embedding and softmax treat rare words, `AdaptiveEmbedding` and `AdaptiveSoftmax`.

    Args:
        config: shape of the model.
        solver, stopping, adjoint, eval_stopping: how the equilibrium is found and differentiated; see `DEQ`.

    Attributes:
        mem_len, eval_mem_len: length of the memory that `forward` returns in training and outside. They start as in the
            config; assign others at any time.

    Raises:
        ValueError: a config that makes no model; tokens, targets or memory of shapes that do not fit together; a memory
            of a dtype or on a device that is not the model's.
        TypeError: a memory that is no `Memory`.

    Source: Bai, Kolter & Koltun, "Deep Equilibrium Models", NeurIPS 2019, section 3.3. Deliberate differences from the
    released code: dropout on the output is shared over time (there it drops whole positions: `drop_positions`),
    `local_size=None` means no limit (there 1000 positions), initialisation reaches weights under weight norm (there it
    is lost: `init_normed`), and losses are in the order of the tokens (there by cluster: `AdaptiveSoftmax.cluster_order`).

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
        self.mem_len, self.eval_mem_len = config.mem_len, config.eval_mem_len
        words = (config.vocab_size, config.d_embed or config.d_model, config.d_model, config.cutoffs, config.div_val)
        self.embedding = AdaptiveEmbedding(*words, init_std=config.init_std)
        self.inject = nn.Linear(config.d_model, 3 * config.d_model)
        block = TransformerBlock(
            config.d_model,
            config.n_head,
            config.d_inner,
            dropout=config.dropout,
            attention_dropout=config.attention_dropout,
            pre_norm=config.pre_norm,
            weight_norm=config.weight_norm,
            init_std=config.init_std,
            init_normed=config.init_normed,
            stored_frequencies=config.stored_frequencies,
        )
        self.deq = DEQ(block, solver=solver, stopping=stopping, adjoint=adjoint, eval_stopping=eval_stopping)
        self.softmax = AdaptiveSoftmax(*words, init_std=config.init_std)
        self._tie()
        self.word_dropout = FrozenDropout(config.dropout, shared_dims=(1,))
        self.output_dropout = FrozenDropout(config.dropout, shared_dims=(2,) if config.drop_positions else (1,))
        nn.init.normal_(self.inject.weight, std=config.inject_std)
        nn.init.zeros_(self.inject.bias)

    def _tie(self) -> None:
        config = self.config
        projections = config.tie_projections
        if projections is None:
            projections = (False,) + (True,) * len(config.cutoffs)
        self.softmax.tie(self.embedding, projections, weights=config.tie_weights)

    # One segment

    def injection(self, tokens: Tensor) -> Tensor:
        """u (B, L, 3d) of tokens (B, L)."""
        words = self.embedding(tokens)
        return affine(self.word_dropout(words, self.word_dropout.mask(words)), self.inject.weight, self.inject.bias)

    def draw_masks(self, injection: Tensor) -> DropoutMasks:
        """The masks of one forward pass; that of attention weights is drawn anew for each piece."""
        return self.block.draw_masks(injection)

    def block_inputs(self, injection: Tensor, past: Memory, masks: DropoutMasks) -> tuple[Any, ...]:
        """What the block's `prepare` takes."""
        columns = past.z.shape[1] + injection.shape[1]
        masks = masks._replace(weights=self.block.draw_weights_mask(injection, columns))
        return injection, past, masks, self.config.local_size

    def past(self, z: Tensor, injection: Tensor) -> Memory:
        """All positions of the piece before."""
        return Memory(z, injection)

    def output(self, z: Tensor) -> Tensor:
        """The states, some of their units dropped."""
        return self.output_dropout(z, self.output_dropout.mask(z))

    # The memory

    def empty_memory(self, batch: int) -> Memory:
        """The memory at the start of a text: no columns."""
        d, like = self.config.d_model, self.inject.weight
        return Memory(like.new_zeros(batch, 0, d), like.new_zeros(batch, 0, 3 * d))

    def remember(self, memory: Memory, z: Tensor, injection: Tensor) -> Memory:
        """The last mem_len columns of [memory; segment], detached."""
        both = Memory(torch.cat((memory.z, z), dim=1).detach(), torch.cat((memory.u, injection), dim=1).detach())
        first = max(both.z.shape[1] - self.memory_length, 0)
        return Memory(both.z[:, first:].contiguous(), both.u[:, first:].contiguous())

    @property
    def memory_length(self) -> int:
        """Positions of the memory that `forward` returns in the present mode, training or evaluation."""
        return self.mem_len if self.training or self.eval_mem_len is None else self.eval_mem_len

    def check_memory(self, memory: Memory, batch: int) -> None:
        """Raise ValueError or TypeError where the memory is not one for `batch` sequences."""
        check_tensors(memory, Memory, self.inject.weight, joined=False)
        d = self.config.d_model
        columns = memory.z.shape[1] if memory.z.dim() == 3 else 0
        if memory.z.shape != (batch, columns, d) or memory.u.shape != (batch, columns, 3 * d):
            raise ValueError(
                f"memory has shapes {tuple(memory.z.shape)} and {tuple(memory.u.shape)}, but {batch} sequences of width "
                f"{d} need ({batch}, M, {d}) and ({batch}, M, {3 * d}); pass the memory that the segment before "
                "returned, or None at the start of a text"
            )

    # A text that grows

    @property
    def window(self) -> int | None:
        """How many positions one position sees in a text that grows, itself included; None for all."""
        if self.config.local_size is not None:
            return self.config.local_size
        return self.memory_length + 1 if self.memory_length else None

    def extend(
        self, tokens: Tensor, cache: AttentionCache | None, window: int | None = None, padding: Tensor | None = None
    ) -> Extension:
        """Add n further tokens (B, n) to a text; see `EquilibriumLM.extend`.

        The cache is keys and values of the last `window` - 1 positions: at equilibrium those of the equilibrium, which is
        one entry; for an explicit twin those of every layer.
        """
        injection, block = self.injection(tokens), self.block
        before = cache.layers if cache else (None,) * (self.config.depth or 1)
        memory = cache.layers[0].keys.shape[2] if cache else 0
        if cache is not None and cache.padding is not None:
            padding = cache.padding if padding is None else cache.padding + padding
        distances = self._distances(injection, cache, memory + tokens.shape[1] + 1, window)
        layers: list[KeysValues] = []
        stats = None
        with computed_once(block):
            args = block.prepare(injection, before[0], None, window, padding, distances)
            z = block.initial(injection)
            if self.config.depth is None:
                z, stats = self.deq.solve(z, *args)
                layers.append(_append(before[0], block.keys_values(z, injection, args.weights), window))
            else:  # the layers differ in what they have seen, and in nothing else
                for past in before:
                    layers.append(_append(past, block.keys_values(z, injection, args.weights), window))
                    z = block(z, *(args if past is None else args._replace(past=past)))
        if padding is not None:
            padding = (padding - (tokens.shape[1] + memory - layers[0].keys.shape[2])).clamp_min(0)
        return Extension(z, AttentionCache(tuple(layers), padding, distances), stats)

    def _distances(self, like: Tensor, cache: AttentionCache | None, count: int, window: int | None) -> Tensor:
        """At least `count` projected distances: those of the cache, or new ones, and more than that where a text grows."""
        if cache is not None and cache.distances is not None and cache.distances.shape[-1] >= count:
            return cache.distances
        if cache is not None:
            count = 2 * count if window is None else max(count, min(2 * count, window + 1))
        return self.block.project_distances(like, count)


def _append(past: KeysValues | None, new: KeysValues, window: int | None) -> KeysValues:
    """The columns that the next position still sees: the last window - 1."""
    if past is not None:
        new = KeysValues(torch.cat((past.keys, new.keys), dim=2), torch.cat((past.values, new.values), dim=2))
    if window is None:
        return new
    first = max(new.keys.shape[2] - (window - 1), 0)
    return KeysValues(new.keys[:, :, first:], new.values[:, :, first:])
