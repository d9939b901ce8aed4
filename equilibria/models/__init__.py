"""Language models at equilibrium, and their explicit twins."""

from equilibria.models.block import Memory, TransformerBlock
from equilibria.models.deq_transformer import DEQTransformerLM, TransformerConfig, TransformerShape
from equilibria.models.generation import generate, next_token_log_prob, sample, stream
from equilibria.models.language_model import EquilibriumLM, LMOutput, LMShape

__all__ = [
    "DEQTransformerLM",
    "EquilibriumLM",
    "LMOutput",
    "LMShape",
    "Memory",
    "TransformerBlock",
    "TransformerConfig",
    "TransformerShape",
    "generate",
    "next_token_log_prob",
    "sample",
    "stream",
]
