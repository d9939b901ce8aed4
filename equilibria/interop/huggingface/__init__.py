"""Hugging Face Transformers: importing this package lets `AutoModelForCausalLM.from_pretrained` load our models.

pip install "equilibria[hf]"
"""

from transformers import AutoConfig, AutoModelForCausalLM

from equilibria.interop.huggingface.cache import EquilibriumCache
from equilibria.interop.huggingface.configuration import CONFIGS, DEQTransformerConfig, DEQTrellisNetConfig
from equilibria.interop.huggingface.modeling import MODELS, DEQTransformerForCausalLM, DEQTrellisNetForCausalLM
from equilibria.interop.huggingface.output import EquilibriumOutput
from equilibria.interop.huggingface.run import from_run
from equilibria.interop.huggingface.tokenization import huggingface_tokenizer

__all__ = [
    "DEQTransformerConfig",
    "DEQTransformerForCausalLM",
    "DEQTrellisNetConfig",
    "DEQTrellisNetForCausalLM",
    "EquilibriumCache",
    "EquilibriumOutput",
    "from_run",
    "huggingface_tokenizer",
]

for _name, _config in CONFIGS.items():
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModelForCausalLM.register(_config, MODELS[_name], exist_ok=True)
