"""What a call of a model returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.utils.generic import ModelOutput

from equilibria.interop.huggingface.cache import EquilibriumCache
from equilibria.solution import Stats


@dataclass
class EquilibriumOutput(ModelOutput):
    """What a call of a model returns; fields that were not asked for are None."""

    loss: Tensor | None = None
    """() the mean over the labels, nats; with the Jacobian loss in training, where the configuration asks for it."""
    logits: Tensor | None = None
    """(B, L, V) log-probabilities, which are logits that are normalised."""
    past_key_values: EquilibriumCache | None = None
    """What a call with the tokens that follow is to be given."""
    hidden_states: tuple[Tensor, ...] | None = None
    """One entry, (B, L, d): the equilibrium."""
    memory: Any = None
    """What the next segment is to be given, where a memory was given."""
    stats: list[Stats] | None = None
    """One entry per solve; empty for an explicit stack."""
    jacobian: Tensor | None = None
    """() the Jacobian loss, unweighted, where it was computed."""
