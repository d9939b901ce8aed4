"""Layers: the equilibrium layer, and what blocks are made of."""

from equilibria.nn.adaptive_embedding import AdaptiveEmbedding
from equilibria.nn.adaptive_softmax import AdaptiveSoftmax
from equilibria.nn.computed_once import computed_once
from equilibria.nn.deq import DEQ
from equilibria.nn.dropout import FrozenDropout, WordDropout
from equilibria.nn.injection import BoundedInjection, DecayInjection
from equilibria.nn.mixture_of_softmaxes import MixtureOfSoftmaxes
from equilibria.nn.monotone import MonotoneBlock, MonotoneDEQ, monotone
from equilibria.nn.parametrizations import spectral_norm, weight_drop, weight_norm
from equilibria.nn.stack import stack

__all__ = [
    "DEQ",
    "AdaptiveEmbedding",
    "AdaptiveSoftmax",
    "BoundedInjection",
    "DecayInjection",
    "FrozenDropout",
    "MixtureOfSoftmaxes",
    "MonotoneBlock",
    "MonotoneDEQ",
    "WordDropout",
    "computed_once",
    "monotone",
    "spectral_norm",
    "stack",
    "weight_drop",
    "weight_norm",
]
