"""Language models at equilibrium, and their explicit twins."""

from equilibria.models.block import Memory, TransformerBlock
from equilibria.models.deq_transformer import DEQTransformerLM, LMOutput, TransformerConfig, TransformerShape
from equilibria.models.generation import generate, next_token_logits, sample, stream

__all__ = [
    "DEQTransformerLM",
    "LMOutput",
    "Memory",
    "TransformerBlock",
    "TransformerConfig",
    "TransformerShape",
    "generate",
    "next_token_logits",
    "sample",
    "stream",
]
