"""The equilibrium cache, in the form in which `generate` of Transformers carries it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from equilibria.models.block import KeysValues
from equilibria.models.deq_transformer import AttentionCache


class EquilibriumCache(Cache):
    """What the next position of each text needs of those before it: see `EquilibriumLM.extend`.

    At equilibrium that is one layer, however many evaluations found it: keys and values of the last `window` - 1 positions
    of a Transformer, the last columns of a TrellisNet.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.state: Any = None
        self.length = 0

    def update_state(self, state: Any, tokens: int) -> None:
        """Keep what `extend` returned after `tokens` further ones."""
        self.state, self.length = state, self.length + tokens

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens so far, padding included."""
        return self.length

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: a text may grow without limit."""
        return -1

    @property
    def batch_size(self) -> int:
        """Number of texts, -1 at the start."""
        if self.state is None:
            return -1
        first = self.state[0]
        return first[0].keys.shape[1] if isinstance(self.state, AttentionCache) else len(first)

    @property
    def is_initialized(self) -> bool:
        """Whether there is a text."""
        return self.state is not None

    @property
    def is_compileable(self) -> bool:
        """False: the cache grows."""
        return False

    @property
    def is_croppable(self) -> bool:
        """Whether all positions are still there, so that the last can be taken away."""
        return self.state is None or (
            isinstance(self.state, AttentionCache) and self.state.layers[0].keys.shape[2] == self.length
        )

    def activate_past_recording(self) -> None:
        """Nothing to do: what is kept, is kept from the start."""

    def reset(self) -> None:
        """Forget the text."""
        self.state, self.length = None, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Take away the last -tokens_to_remove positions. ValueError where those before them have been dropped."""
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove is {tokens_to_remove}; give a negative number, or 0")
        if tokens_to_remove == 0:
            return
        if not self.is_croppable:
            raise ValueError(
                "the cache has dropped the positions that no later one sees, so that the last ones cannot be taken away; "
                "generate without an assistant, or give the model a window as long as the text"
            )
        if self.state is not None:
            layers = (KeysValues(k[:, :, :tokens_to_remove], v[:, :, :tokens_to_remove]) for k, v in self.state.layers)
            self.state = self.state._replace(layers=tuple(layers))
            self.length += tokens_to_remove

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let each row go on from the row beam_idx (N,) names, as beam search does."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows that are named, in that order."""
        if self.state is not None:
            self.state = self.state.rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        if self.state is not None:
            rows = torch.arange(self.batch_size, device=_device(self.state))
            self.batch_select_indices(rows.repeat_interleave(repeats))

    def __repr__(self) -> str:
        return f"EquilibriumCache({self.length} tokens of {max(self.batch_size, 0)} texts)"


def _device(state: Any) -> torch.device:
    return state.layers[0].keys.device if isinstance(state, AttentionCache) else state.words.device
