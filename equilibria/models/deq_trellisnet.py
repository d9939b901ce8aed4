"""The DEQ-TrellisNet language model, and its explicit twin."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from equilibria.adjoints import Adjoint
from equilibria.models.causal_convolution import CausalConvolution
from equilibria.models.language_model import EquilibriumLM, Extension, LMConfig, LMShape, rolled
from equilibria.models.memory import check_tensors
from equilibria.models.trellis_block import TrellisBlock, TrellisMasks
from equilibria.nn.adaptive_softmax import AdaptiveSoftmax
from equilibria.nn.deq import DEQ
from equilibria.nn.dropout import FrozenDropout, WordDropout
from equilibria.nn.mixture_of_softmaxes import MixtureOfSoftmaxes
from equilibria.solvers import Solver
from equilibria.stopping import Stopping


@dataclass(frozen=True, kw_only=True)
class TrellisShape(LMShape):
    """What a `DEQTrellisNetLM` is like, whatever it reads. H = d_hidden + d_output."""

    d_embed: int = 128
    """Width of the word vectors."""
    d_hidden: int = 128
    """Units of the state that only the state reads."""
    d_output: int = 128
    """Units of the state that the softmax reads, too."""
    kernel_size: int = 2
    """Taps of the two convolutions over time."""
    dilation: int = 1
    """Positions from one tap of the state's convolution to the next."""
    n_experts: int = 0
    """Softmaxes that are mixed; 0 for a single one."""
    word_dropout: float = 0.0
    """Probability of dropping a word of the vocabulary, wherever it occurs."""
    input_dropout: float = 0.0
    """Probability of dropping a unit of the word vectors, at all positions."""
    hidden_dropout: float = 0.0
    """Probability of dropping a unit of what the state's convolution reads, at all positions."""
    output_dropout: float = 0.0
    """Probability of dropping a unit of what the softmax reads, at all positions."""
    latent_dropout: float = 0.0
    """With n_experts: probability of dropping a unit of the vectors of the mixture, at all positions."""
    weight_dropout: float = 0.0
    """Probability of dropping a weight of the two convolutions, except of their last taps. One draw per segment."""
    embed_range: float = 0.1
    """Word vectors start as U(-embed_range, embed_range), and so does the softmax where the two are not tied."""
    init_std: float = 0.01
    """Standard deviation of the weights of the state's convolution at the start."""
    inject_std: float = 0.01
    """That of the convolution of the word vectors."""
    init_as_released: bool = False
    """Begin as in the released code: the convolution of the word vectors as nn.Conv1d draws it, the bias of the state's
    convolution from the distribution of its weights, a mixture's experts as nn.Linear draws them."""
    freeze_last_row: bool = False
    """Let the embedding of the last word learn from the softmax alone, as in the released code, by accident."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_counts(d_embed=1, d_hidden=1, d_output=1, kernel_size=1, dilation=1, n_experts=0)
        self._check_positive("embed_range", "init_std", "inject_std")
        if self.n_experts and self.cutoffs:
            raise ValueError(
                f"n_experts is {self.n_experts} and cutoffs is {self.cutoffs}, but a mixture of softmaxes is not split; "
                "give n_experts 0 or no cutoffs"
            )
        if self.tie_weights and not self.n_experts and self.d_embed != self.d_output:
            raise ValueError(
                f"tie_weights is True, but the word vectors have width d_embed {self.d_embed} and the softmax reads "
                f"d_output {self.d_output}; make the two equal, leave the weights untied, or give n_experts, for a "
                "mixture of softmaxes reads vectors of width d_embed"
            )


@dataclass(frozen=True, kw_only=True)
class TrellisConfig(TrellisShape, LMConfig):
    """The shape of a `DEQTrellisNetLM`, and of its vocabulary."""


class TrellisMemory(NamedTuple):
    """The position before a segment."""

    z: Tensor
    """(B, 1, 2H) its state."""


class TrellisCache(NamedTuple):
    """What the next position of a growing text needs of those before it."""

    words: Tensor
    """(B, reach, d_embed), the last word vectors."""
    states: tuple[Tensor, ...]
    """(B, P, 2H), the last states: one entry at equilibrium, one for each layer of an explicit twin."""

    def rows(self, index: Tensor) -> TrellisCache:
        """The cache of the samples index (N,), which may repeat."""
        return TrellisCache(self.words[index], tuple(states[index] for states in self.states))


class DEQTrellisNetLM(EquilibriumLM):
    """Language model whose one layer is a TrellisNet block at equilibrium: z* = f(z*; u), p(next) = softmax(E out(z*) + b).

    Word vectors (B, L, d_embed) are convolved over time to the injection u (B, L, 4H), with zeros before the segment.
    The block (see `TrellisBlock`) is a causal convolution of the state with the gates of an LSTM; the softmax reads the
    last d_output units of its hidden part. The state of the last position of a segment is the memory of the next one,
    without gradient. How a segment is read, and what the explicit twin is, says `EquilibriumLM`.

    The softmax is plain, split at `cutoffs` (see `AdaptiveSoftmax`), or a mixture of `n_experts` (`MixtureOfSoftmaxes`).
    Weight dropout acts on the convolutions, under weight norm on the directions of their weights, before they are
    normalised.

    Args:
        config: shape of the model.
        solver, stopping, adjoint, eval_stopping: how the equilibrium is found and differentiated; see `DEQ`.

    Raises:
        ValueError: a config that makes no model; tokens, targets or memory of shapes that do not fit together; a memory
            of a dtype or on a device that is not the model's.
        TypeError: a memory that is no `TrellisMemory`.

    Sources: Bai, Kolter & Koltun, "Deep Equilibrium Models", NeurIPS 2019, section 3.3; the same, "Trellis Networks for
    Sequence Modeling", 2019; for the kinds of dropout Merity, Keskar & Socher, "Regularizing and Optimizing LSTM Language
    Models", 2018. Deliberate differences from the released code: the memory is detached, and the embedding of the last
    word of the vocabulary receives its gradient (there it does not: `freeze_last_row`).

    >>> model = DEQTrellisNetLM(TrellisConfig(vocab_size=100, d_embed=8, d_hidden=16, d_output=8))
    >>> text = torch.randint(100, (2, 9))
    >>> nll, memory, stats, _ = model(text[:, :-1], text[:, 1:])
    >>> nll.shape, memory.z.shape
    (torch.Size([2, 8]), torch.Size([2, 1, 48]))
    """

    def __init__(
        self,
        config: TrellisConfig,
        *,
        solver: Solver[Any] | None = None,
        stopping: Stopping | None = None,
        adjoint: Adjoint | None = None,
        eval_stopping: Stopping | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        block = TrellisBlock(
            config.d_hidden,
            config.d_output,
            config.kernel_size,
            config.dilation,
            dropout=config.hidden_dropout,
            weight_dropout=config.weight_dropout,
            weight_norm=config.weight_norm,
            init_std=config.init_std,
            bias_std=config.init_std if config.init_as_released else 0.0,
        )
        self.embedding = nn.Embedding(config.vocab_size, config.d_embed)
        self.inject = CausalConvolution(
            config.d_embed,
            4 * block.d_state,
            config.kernel_size,
            weight_dropout=config.weight_dropout,
            weight_norm=config.weight_norm,
            init_std=None if config.init_as_released else config.inject_std,
        )
        self.deq = DEQ(block, solver=solver, stopping=stopping, adjoint=adjoint, eval_stopping=eval_stopping)
        self.word_dropout = WordDropout(config.word_dropout, freeze_last_row=config.freeze_last_row)
        self.input_dropout = FrozenDropout(config.input_dropout, shared_dims=(1,))  # (B, 1, d_embed)
        self.output_dropout = FrozenDropout(config.output_dropout, shared_dims=(1,))  # (B, 1, d_output)
        nn.init.uniform_(self.embedding.weight, -config.embed_range, config.embed_range)
        softmax = _softmax(config)
        if config.tie_weights:
            softmax.tie(self.embedding)
        self.softmax = softmax

    # One segment

    def injection(self, tokens: Tensor) -> Tensor:
        """u (B, L, 4H) of tokens (B, L)."""
        words = self._words(tokens)
        return self.inject(F.pad(words, (0, 0, self.inject.reach, 0)))

    def draw_masks(self, injection: Tensor) -> TrellisMasks:
        """The masks of one forward pass, for all its pieces."""
        return self.block.draw_masks(injection)

    def block_inputs(self, injection: Tensor, past: TrellisMemory, masks: TrellisMasks) -> tuple[Any, ...]:
        """What the block's `prepare` takes."""
        return injection, past.z, masks

    def past(self, z: Tensor, injection: Tensor) -> TrellisMemory:
        """The last position of the piece before."""
        return TrellisMemory(z[:, -1:])

    def output(self, z: Tensor) -> Tensor:
        """The last d_output units of the hidden part, (B, L, d_output), some of them dropped."""
        hidden = z[..., self.config.d_hidden : self.block.d_state]
        return self.output_dropout(hidden, self.output_dropout.mask(hidden))

    def _words(self, tokens: Tensor) -> Tensor:
        words = self.word_dropout(self.embedding.weight, tokens)  # (B, L, d_embed)
        return self.input_dropout(words, self.input_dropout.mask(words))

    # The memory

    def empty_memory(self, batch: int) -> TrellisMemory:
        """The memory at the start of a text: a state of zeros."""
        return TrellisMemory(self.embedding.weight.new_zeros(batch, 1, 2 * self.block.d_state))

    def remember(self, memory: TrellisMemory, z: Tensor, injection: Tensor) -> TrellisMemory:
        """The last position, detached."""
        return TrellisMemory(z[:, -1:].detach().clone())  # not a view, which would keep the whole segment

    def check_memory(self, memory: TrellisMemory, batch: int) -> None:
        """Raise ValueError or TypeError where the memory is not one for `batch` sequences."""
        check_tensors(memory, TrellisMemory, self.embedding.weight, joined=True)
        expected = (batch, 1, 2 * self.block.d_state)
        if memory.z.shape != expected:
            raise ValueError(
                f"memory has shape {tuple(memory.z.shape)}, but {batch} sequences need {expected}; pass the memory that "
                "the segment before returned, or None at the start of a text"
            )

    # A text that grows

    def extend(
        self, tokens: Tensor, cache: TrellisCache | None, window: int | None = None, padding: Tensor | None = None
    ) -> Extension:
        """Add n further tokens (B, n) to a text; see `EquilibriumLM.extend`.

        A position sees as far back as the block reaches; `window` has no effect. Padding is moved behind the text, where
        the causal map does not see it.
        """
        block, reach = self.block, self.inject.reach
        words = self._words(tokens if padding is None else rolled(tokens, padding))
        columns = F.pad(words, (0, 0, reach, 0)) if cache is None else torch.cat((cache.words, words), dim=1)
        injection = self.inject(columns)
        layers: list[Tensor] = []
        stats = None
        if self.config.depth is None:
            past = cache.states[0] if cache else None
            z, stats = self.deq(injection, past)
            layers.append(self._append(past, z, padding))
        else:
            z = block.initial(injection)
            for layer in range(self.config.depth):
                past = cache.states[layer] if cache else None
                layers.append(self._append(past, z, padding))
                z = block(z, *block.prepare(injection, past))
        if padding is not None:
            z = rolled(z, -padding)
        return Extension(z, TrellisCache(_last(columns, reach, padding), tuple(layers)), stats)

    def _append(self, past: Tensor | None, z: Tensor, padding: Tensor | None) -> Tensor:
        """The last states that the next position still sees: those that the convolution reaches, one at least."""
        if past is None:  # a text starts behind a state of zeros
            past = torch.zeros_like(z[:, :1])
        return _last(torch.cat((past, z), dim=1), max(self.block.conv.reach, 1), padding)


def _last(columns: Tensor, count: int, padding: Tensor | None) -> Tensor:
    """The last `count` columns before those that are padding; the first stands for all before it."""
    if padding is None:
        return columns[:, max(columns.shape[1] - count, 0) :]
    index = columns.shape[1] - padding[:, None] - count + torch.arange(count, device=columns.device)
    return columns[torch.arange(len(columns), device=columns.device)[:, None], index.clamp_min(0)]


def _softmax(config: TrellisConfig) -> AdaptiveSoftmax | MixtureOfSoftmaxes:
    words, width = config.vocab_size, config.d_output
    if config.n_experts:
        softmax = MixtureOfSoftmaxes(
            words,
            width,
            config.d_embed,
            config.n_experts,
            config.latent_dropout,
            init_std=None if config.init_as_released else 0.01,
        )
        vectors = softmax.weight
    else:
        softmax = AdaptiveSoftmax(words, width, width, config.cutoffs)
        (vectors,) = softmax.weights
    nn.init.uniform_(vectors, -config.embed_range, config.embed_range)
    return softmax
