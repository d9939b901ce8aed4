"""Layers: the equilibrium layer, and what blocks are made of."""

from equilibria.nn.computed_once import computed_once
from equilibria.nn.deq import DEQ
from equilibria.nn.dropout import FrozenDropout
from equilibria.nn.injection import BoundedInjection, DecayInjection
from equilibria.nn.monotone import MonotoneBlock, MonotoneDEQ, monotone
from equilibria.nn.parametrizations import spectral_norm, weight_drop, weight_norm
from equilibria.nn.stack import stack

__all__ = [
    "DEQ",
    "BoundedInjection",
    "DecayInjection",
    "FrozenDropout",
    "MonotoneBlock",
    "MonotoneDEQ",
    "computed_once",
    "monotone",
    "spectral_norm",
    "stack",
    "weight_drop",
    "weight_norm",
]
