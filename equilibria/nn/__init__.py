"""Layers: the equilibrium layer, and what blocks are made of."""

from equilibria.nn.deq import DEQ

__all__ = ["DEQ"]
