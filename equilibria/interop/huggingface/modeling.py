"""Language models at equilibrium as Transformers knows models: `from_pretrained`, `generate`, `Trainer`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel

from equilibria.interop.huggingface.cache import EquilibriumCache
from equilibria.interop.huggingface.configuration import (
    SHIM,
    DEQTransformerConfig,
    DEQTrellisNetConfig,
    EquilibriumConfig,
)
from equilibria.interop.huggingface.masks import leading_padding
from equilibria.interop.huggingface.output import EquilibriumOutput
from equilibria.models import EquilibriumLM
from equilibria.models.language_model import rolled
from equilibria.nn.clusters import check_ids
from equilibria.nn.computed_once import computed_once
from equilibria.recipes.build import build_model

ALIGNED = 64
"""Bytes: the place of a tensor that PyTorch itself makes is a multiple of it."""
IGNORED = -100
"""A label that is not predicted."""
SHIM_TEXT = '''"""Lets Transformers find the classes of the installed package: pip install "equilibria[hf]"."""

from equilibria.interop.huggingface import (  # noqa: F401
    DEQTransformerConfig,
    DEQTransformerForCausalLM,
    DEQTrellisNetConfig,
    DEQTrellisNetForCausalLM,
)
'''


class EquilibriumForCausalLM(PreTrainedModel, GenerationMixin):
    """A language model of this library, `lm`, with its parameters under their own names behind `lm.`.

    Outside training a call is one solve for all tokens, in which each sees the `window` last ones, itself included; with
    `past_key_values` of an earlier call it solves for the further tokens alone. In training, and where a `memory` is given,
    a call reads a segment as `EquilibriumLM` does: tokens see all of it, and the memory.

    Padding before a text and behind it, as `attention_mask` shows it, changes nothing in the text.
    """

    config: EquilibriumConfig
    config_class = EquilibriumConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = False  # the memory of training does not grow with depth
    accepts_loss_kwargs = True
    _no_split_modules = ["DEQTransformerLM", "DEQTrellisNetLM"]  # noqa: RUF012 - as Transformers wants it
    _keep_in_fp32_modules_strict = ["frequencies"]  # noqa: RUF012 - rounded ones would be other positions

    def __init__(self, config: EquilibriumConfig) -> None:
        super().__init__(config)
        self.lm: EquilibriumLM = build_model(config.run_config(), config.vocab_size)
        # What a window or a convolution has dropped, no assistant's proposal can bring back.
        self._is_stateful = self.window is not None or config.family == "trellisnet"
        self._tied_weights_keys = _ties(self)
        self._keys_to_ignore_on_save = list(self._tied_weights_keys)
        for tensor in _tensors(self).values():  # they are drawn, unless they are to be loaded
            if not tensor.is_meta:
                tensor._is_hf_initialized = True  # pyright: ignore[reportAttributeAccessIssue]
        self.post_init()

    @property
    def window(self) -> int | None:
        """How many positions one position sees outside training, itself included; None for all."""
        return self.config.window if self.config.window is not None else self.lm.window

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: EquilibriumCache | None = None,
        use_cache: bool | None = None,
        memory: Any = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: int | Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> EquilibriumOutput | tuple[Any, ...]:
        """Read tokens, and say what may follow each of them.

        Args:
            input_ids: (B, L) int64.
            attention_mask: (B, M + L), 0 where there is padding, before or behind a text, else 1; M tokens are in
                `past_key_values`.
            labels: (B, L), usually input_ids: the label of a token is predicted at the one before it. -100 is not
                predicted, nor is the first token of a text behind padding.
            past_key_values: what an earlier call returned; it is extended.
            use_cache: whether to return `past_key_values`; None for the configuration's.
            memory: of the segment before, or `empty_memory(B)` at the start of a text.
            logits_to_keep: compute the logits of that many last positions alone, or of those whose indices are given;
                0 for all.
            num_items_in_batch: divide the loss by this instead of the number of labels, as `Trainer` does.

        Raises:
            ValueError: shapes that do not fit, padding inside a text, or arguments that exclude each other.
        """
        if output_attentions:
            raise ValueError("output_attentions is True, but a solve has many attentions; leave it out")
        with computed_once(self.lm):
            z, others = self._states(input_ids, attention_mask, past_key_values, use_cache, memory, labels is not None)
            hidden = self.lm.output(z)
            logits = loss = None
            if labels is None or not self.training or self.config.logits_in_training:
                logits = self.lm.softmax.log_prob(_kept(hidden, logits_to_keep))
            if labels is not None:
                whole = isinstance(logits_to_keep, int) and logits_to_keep == 0
                if attention_mask is not None:
                    at_padding = attention_mask[:, -labels.shape[1] :].roll(1, dims=1) == 0
                    labels = labels.masked_fill(at_padding.to(labels.device), IGNORED)
                loss = self._loss(hidden, logits if whole else None, labels, num_items_in_batch, others["jacobian"])
        shown = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        output = EquilibriumOutput(loss=loss, logits=logits, hidden_states=(z,) if shown else None, **others)
        wants_dict = self.config.return_dict if return_dict is None else return_dict
        return output if wants_dict else output.to_tuple()

    def empty_memory(self, batch: int) -> Any:
        """The memory at the start of `batch` texts."""
        return self.lm.empty_memory(batch)

    # The parts of a call

    def _states(
        self, tokens: Tensor, mask: Tensor | None, past: Any, use_cache: bool | None, memory: Any, labelled: bool
    ) -> tuple[Tensor, dict[str, Any]]:
        """States (B, L, d), and the fields of the output that come with them."""
        cache = _cache(past)
        padding = leading_padding(mask, tokens, cache.length)
        if padding is not None and mask is not None:
            tokens = tokens.masked_fill(mask[:, -tokens.shape[1] :] == 0, 0)  # whatever stands there
        if not self.training and memory is None:
            z, state, stats = self.lm.extend(tokens, cache.state, self.window, padding)
            cache.update_state(state, tokens.shape[1])
            kept = self.config.use_cache if use_cache is None else use_cache
            solved = [] if stats is None else [stats]
            return z, {"past_key_values": cache if kept else None, "stats": solved, "jacobian": None}
        if cache.length:
            raise ValueError("past_key_values go with neither a memory nor training; leave them out, or call model.eval()")
        if padding is not None and memory is not None:
            raise ValueError("attention_mask has padding between a text and its memory; pad behind the text instead")
        z, remembered, stats, jacobian = self.lm.read(
            tokens if padding is None else rolled(tokens, padding), memory, jacobian=labelled and self._wants_jacobian()
        )
        fields = {"memory": None if memory is None else remembered, "stats": stats, "jacobian": jacobian}
        return z if padding is None else rolled(z, -padding), fields

    def _loss(
        self, hidden: Tensor, log_prob: Tensor | None, labels: Tensor, items: int | Tensor | None, jacobian: Tensor | None
    ) -> Tensor:
        targets = labels[:, 1:].to(hidden.device)
        counted = targets != IGNORED
        targets = targets.masked_fill(~counted, 0)
        if log_prob is None:
            nll = self.lm.softmax(hidden[:, :-1], targets)
        else:
            check_ids(targets, self.config.vocab_size)
            nll = -log_prob[:, :-1].gather(-1, targets[..., None])[..., 0]
        count = counted.sum()
        share = 1.0 if items is None else count / torch.as_tensor(items, device=count.device)
        loss = share * (nll[counted].sum() / count)
        return loss if jacobian is None else loss + share * self._jacobian("weight") * jacobian

    def _wants_jacobian(self) -> bool:
        wanted = self.training and self.lm.config.depth is None and self._jacobian("weight") > 0
        return wanted and torch.rand(()).item() < self._jacobian("share")

    def _jacobian(self, name: str) -> float:
        return getattr(self.config, f"jacobian_{name}")

    # What Transformers asks of a model

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As of `GenerationMixin`. ValueError in training mode, in which there is no cache."""
        if self.training:
            raise ValueError("the model is in training mode, in which there is no cache; call model.eval() first")
        mixin: Any = super()
        return mixin.prepare_inputs_for_generation(*args, **kwargs)

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """Name of a parameter -> name of the one that it is, also where projections alone are tied."""
        return dict(self._tied_weights_keys or {})

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As of `PreTrainedModel`. The tensors are copied out of the file, in which they lie at odd places: there the same
        matrix product rounds otherwise, and the numbers would not be those of the model that was saved."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        for tensor in _tensors(model).values():
            if tensor.device.type == "cpu" and tensor.data_ptr() % ALIGNED:
                tensor.data = tensor.data.clone()
        return loaded

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As of `PreTrainedModel`, in safetensors, with a module of a few lines for `trust_remote_code`."""
        super().save_pretrained(save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            (Path(save_directory) / f"{SHIM}.py").write_text(SHIM_TEXT, encoding="utf-8")

    def get_input_embeddings(self) -> nn.Module:
        """The embedding of tokens."""
        return self.lm.get_submodule("embedding")

    def set_input_embeddings(self, value: nn.Module) -> None:
        """ValueError: embedding and softmax share their tables and the clusters of the vocabulary."""
        raise ValueError("the embedding cannot be exchanged alone, for the softmax shares it; make a model of the new size")

    def get_output_embeddings(self) -> None:
        """None: the softmax is no linear layer."""

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> Any:
        """The embedding, if the size stays; ValueError otherwise, for the clusters of the softmax cover the vocabulary."""
        if new_num_tokens not in (None, self.config.vocab_size):
            raise ValueError(
                f"the model has {self.config.vocab_size} tokens and cannot be given {new_num_tokens}: the clusters of its "
                "embedding and softmax cover the vocabulary; make a new model with that vocab_size, or pad with a token "
                "that it has"
            )
        return self.get_input_embeddings()

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """Does nothing: a saved folder needs no copy of our files, for it has `equilibria_model.py`."""

    def _prepare_cache_for_generation(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, generation_config: Any, model_kwargs: dict[str, Any], *_: Any, **__: Any
    ) -> None:
        """Put our own cache where `generate` would put its own."""
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic"):
            raise ValueError(f"cache_implementation is {kind!r}, but there is one equilibrium cache; leave it out")
        if generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = _cache(model_kwargs.get("past_key_values"))

    def _init_weights(self, module: nn.Module) -> None:
        """Draw what a loaded folder lacks of this module, as a new model would."""
        tensors = _tensors(module, recurse=False).items()
        lacking = {name: tensor for name, tensor in tensors if not getattr(tensor, "_is_hf_initialized", False)}
        if not lacking:
            return
        path = next(name for name, each in self.lm.named_modules() if each is module)
        with torch.device("cpu"):
            fresh = build_model(self.config.run_config(), self.config.vocab_size).get_submodule(path)
        for name, tensor in lacking.items():
            tensor.copy_(_tensors(fresh, recurse=False)[name])


class DEQTransformerForCausalLM(EquilibriumForCausalLM):
    """A DEQ-Transformer (`DEQTransformerLM`) for Transformers; see `EquilibriumForCausalLM`."""

    config_class = DEQTransformerConfig


class DEQTrellisNetForCausalLM(EquilibriumForCausalLM):
    """A DEQ-TrellisNet (`DEQTrellisNetLM`) for Transformers; see `EquilibriumForCausalLM`."""

    config_class = DEQTrellisNetConfig


MODELS: dict[str, type[EquilibriumForCausalLM]] = {
    "transformer": DEQTransformerForCausalLM,
    "trellisnet": DEQTrellisNetForCausalLM,
}
"""Name of a family -> its model here."""


def _cache(past: Any) -> EquilibriumCache:
    """The cache that was given, or a new one."""
    if past is None or (not isinstance(past, EquilibriumCache) and not past.get_seq_length()):
        return EquilibriumCache()
    if not isinstance(past, EquilibriumCache):
        raise TypeError(
            f"past_key_values is a {type(past).__name__}; give the EquilibriumCache that an earlier call returned, or None"
        )
    return past


def _kept(hidden: Tensor, wanted: int | Tensor) -> Tensor:
    """The positions of hidden (B, L, d) whose logits are wanted."""
    if isinstance(wanted, int):
        return hidden[:, -wanted:] if wanted else hidden
    return hidden[:, wanted]


def _ties(model: nn.Module) -> dict[str, str]:
    """Name of a parameter -> the first name of the same."""
    first: dict[int, str] = {}
    ties: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if first.setdefault(id(parameter), name) != name:
            ties[name] = first[id(parameter)]
    return ties


def _tensors(module: nn.Module, *, recurse: bool = True) -> dict[str, Tensor]:
    return {**dict(module.named_parameters(recurse=recurse)), **dict(module.named_buffers(recurse=recurse))}
