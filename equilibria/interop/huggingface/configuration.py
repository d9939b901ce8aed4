"""Configurations for Hugging Face Transformers: the fields of a model's shape and of its solves, as plain values."""

from __future__ import annotations

import dataclasses
import difflib
import re
from typing import TYPE_CHECKING, Any, ClassVar

from transformers import GenerationConfig, PreTrainedConfig

from equilibria.recipes.build import eval_stopping
from equilibria.stopping import Stopping
from equilibria.train.config import RunConfig, from_json
from equilibria.train.model_config import FAMILIES
from equilibria.train.solve_config import SolveConfig

SHIM = "equilibria_model"
"""Module in an exported folder through which Transformers finds the classes of this package."""
STEPPED = ("max_evals_delta", "jacobian_increment", "jacobian_every")
"""Fields of the solves that count the steps of our own training loop, and mean nothing here."""
THEIRS = {
    *(item.name for item in dataclasses.fields(PreTrainedConfig)),
    *("model_type", "auto_map", "attn_implementation", "experts_implementation", "name_or_path", "torch_dtype"),
    *("output_attentions", "num_labels", "tokenizer_class", "quantization_config", "transformers_weights"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
    *GenerationConfig().to_dict(),
}
"""What Transformers itself puts into a configuration."""


class EquilibriumConfig(PreTrainedConfig):
    """What the configurations of both families have in common.

    Args:
        vocab_size: number of tokens, as in `len(tokenizer)`.
        window: how many positions one position sees outside training, itself included; None: what `generate` of
            `equilibria.models` takes, which is local_size, or the length of the memory and one.
        logits_in_training: False leaves the logits out where labels are given in training, which saves much time and
            memory with a large vocabulary and an adaptive softmax.
        values: fields of the shape (`TransformerShape` or `TrellisShape`) and of `SolveConfig`, by name, and what
            Transformers itself knows.

    Raises:
        ValueError: an unknown name, or values that do not go together.
    """

    family: ClassVar[str]
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "memory", "stats", "jacobian"]

    vocab_size: int = 2048
    window: int | None = None
    use_cache: bool = True
    logits_in_training: bool = True

    def __post_init__(self, **values: Any) -> None:
        values = {self.attribute_map.get(name, name): value for name, value in values.items()}
        ours = {name: values.pop(name, default) for name, default in self.own_defaults().items()}
        self._refuse_unknown(values)
        for name, value in ours.items():
            setattr(self, name, list(value) if isinstance(value, tuple) else value)  # as it comes back from JSON
        super().__post_init__(**values)
        self.auto_map = {
            "AutoConfig": f"{SHIM}.{type(self).__name__}",
            "AutoModelForCausalLM": f"{SHIM}.{type(self).__name__.removesuffix('Config')}ForCausalLM",
        }
        self.run_config()

    @classmethod
    def own_defaults(cls) -> dict[str, Any]:
        """Name and default of every field of the shape and of the solves."""
        fields = (*dataclasses.fields(FAMILIES[cls.family]), *dataclasses.fields(SolveConfig))
        return {item.name: item.default for item in fields if item.name not in STEPPED}

    @classmethod
    def from_run_config(cls, run: RunConfig, vocab_size: int, **values: Any) -> EquilibriumConfig:
        """The configuration of the model of a run."""
        shape, solves = dataclasses.asdict(run.model), dataclasses.asdict(run.solver)
        for name in STEPPED:
            del solves[name]
        return cls(vocab_size=vocab_size, **shape, **solves, **values)

    def run_config(self) -> RunConfig:
        """The same values as a configuration of this library, checked; ValueError where they do not go together."""
        shape = {item.name: getattr(self, item.name) for item in dataclasses.fields(FAMILIES[self.family])}
        solves = {
            item.name: getattr(self, item.name) for item in dataclasses.fields(SolveConfig) if item.name not in STEPPED
        }
        for name in ("vocab_size", "window"):
            value = getattr(self, name)
            whole = isinstance(value, int) and value >= 1
            if not whole and (value is not None or name == "vocab_size"):
                raise ValueError(f"{type(self).__name__}: {name} is {value!r}; give a whole number, 1 or more")
        values = {"recipe": "huggingface", "model": {"family": self.family, **shape}, "solver": solves}
        try:
            return from_json(values, type(self).__name__)
        except ValueError as error:  # names its fields as they are typed on the command line
            named = re.sub(r"--([a-z][a-z-]*)", lambda option: option[1].replace("-", "_"), str(error))
            raise ValueError(named.replace(" is not a configuration of this version", "")) from None

    def eval_stopping(self) -> Stopping:
        """When a solve outside training is done."""
        return eval_stopping(self.run_config().solver)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """Does nothing: a saved folder needs no copy of our files, for it has `equilibria_model.py`."""

    @classmethod
    def _refuse_unknown(cls, values: dict[str, Any]) -> None:
        known = [*cls.own_defaults(), "vocab_size", "window", "use_cache", "logits_in_training"]
        for name in values:
            if name in THEIRS or name.startswith("_"):
                continue
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}?" if close else "see the fields of the shape and of SolveConfig"
            raise ValueError(f"{cls.__name__} has no field {name!r}; {hint}")


class DEQTransformerConfig(EquilibriumConfig):
    """Configuration of a DEQ-Transformer: the fields of `TransformerShape` and of `SolveConfig`; see `EquilibriumConfig`.

    DEQTransformerConfig(vocab_size=1000, d_model=64, n_head=4, d_inner=256, rtol=1e-3, max_evals=30)
    """

    model_type = "deq-transformer"
    family = "transformer"
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "d_model",
        "num_attention_heads": "n_head",
        "tie_word_embeddings": "tie_weights",
    }

    if TYPE_CHECKING:  # as the fields of shape and solves are no fields of the dataclass

        def __init__(self, **values: Any) -> None: ...


class DEQTrellisNetConfig(EquilibriumConfig):
    """Configuration of a DEQ-TrellisNet: the fields of `TrellisShape` and of `SolveConfig`; see `EquilibriumConfig`.

    DEQTrellisNetConfig(vocab_size=1000, d_embed=32, d_hidden=64, d_output=32)
    """

    model_type = "deq-trellisnet"
    family = "trellisnet"
    attribute_map: ClassVar[dict[str, str]] = {"hidden_size": "d_output", "tie_word_embeddings": "tie_weights"}

    if TYPE_CHECKING:  # as the fields of shape and solves are no fields of the dataclass

        def __init__(self, **values: Any) -> None: ...


CONFIGS: dict[str, type[EquilibriumConfig]] = {kind.family: kind for kind in (DEQTransformerConfig, DEQTrellisNetConfig)}
"""Name of a family, as in the config.json of a run -> its configuration here."""
