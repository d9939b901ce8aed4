"""What a fixed point is like: how fast iteration contracts, how well its gradient is determined, how a solve went."""

from equilibria.diagnostics.conditioning import Conditioning, backward_condition
from equilibria.diagnostics.convergence import contraction_rate, plot_convergence
from equilibria.diagnostics.spectral_radius import SpectralRadius, spectral_radius
from equilibria.diagnostics.summary import Summary, summary

__all__ = [
    "Conditioning",
    "SpectralRadius",
    "Summary",
    "backward_condition",
    "contraction_rate",
    "plot_convergence",
    "spectral_radius",
    "summary",
]
