"""Layers: the equilibrium layer, and what blocks are made of."""

from equilibria.nn.deq import DEQ
from equilibria.nn.dropout import FrozenDropout
from equilibria.nn.monotone import MonotoneBlock, MonotoneDEQ, monotone
from equilibria.nn.stack import stack

__all__ = ["DEQ", "FrozenDropout", "MonotoneBlock", "MonotoneDEQ", "monotone", "stack"]
