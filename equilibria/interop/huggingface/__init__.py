"""Hugging Face Transformers: importing this package lets `AutoModelForCausalLM.from_pretrained` load our models.

    pip install "equilibria[hf]"
"""

from transformers import AutoConfig, AutoModelForCausalLM

from equilibria.interop.huggingface.cache import EquilibriumCache
from equilibria.interop.huggingface.configuration import CONFIGS, DEQTransformerConfig, DEQTrellisNetConfig
from equilibria.interop.huggingface.modeling import (
    MODELS,
    DEQTransformerForCausalLM,
    DEQTrellisNetForCausalLM,
    EquilibriumOutput,
)

__all__ = [
    "DEQTransformerConfig",
    "DEQTransformerForCausalLM",
    "DEQTrellisNetConfig",
    "DEQTrellisNetForCausalLM",
    "EquilibriumCache",
    "EquilibriumOutput",
]

for _name, _config in CONFIGS.items():
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModelForCausalLM.register(_config, MODELS[_name], exist_ok=True)
