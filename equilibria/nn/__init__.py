"""Layers: the equilibrium layer, and what blocks are made of."""

from equilibria.nn.deq import DEQ
from equilibria.nn.dropout import FrozenDropout

__all__ = ["DEQ", "FrozenDropout"]
