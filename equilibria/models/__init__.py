"""Language models at equilibrium, and their explicit twins."""

from equilibria.models.block import Memory, TransformerBlock
from equilibria.models.deq_transformer import DEQTransformerLM, TransformerConfig, TransformerShape
from equilibria.models.deq_trellisnet import DEQTrellisNetLM, TrellisConfig, TrellisMemory, TrellisShape
from equilibria.models.frequencies import start_from_frequencies
from equilibria.models.generation import generate, next_token_log_prob, sample, stream
from equilibria.models.language_model import EquilibriumLM, LMOutput, LMShape
from equilibria.models.trellis_block import TrellisBlock

__all__ = [
    "DEQTransformerLM",
    "DEQTrellisNetLM",
    "EquilibriumLM",
    "LMOutput",
    "LMShape",
    "Memory",
    "TransformerBlock",
    "TransformerConfig",
    "TransformerShape",
    "TrellisBlock",
    "TrellisConfig",
    "TrellisMemory",
    "TrellisShape",
    "generate",
    "next_token_log_prob",
    "sample",
    "start_from_frequencies",
    "stream",
]
