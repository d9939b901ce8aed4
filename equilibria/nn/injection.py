"""How an input enters the map of an equilibrium without being able to blow it up."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from equilibria.nn.parametrizations import spectral_norm


class BoundedInjection(nn.Linear):
    """U x + b with ‖U‖₂ <= bound: inputs that differ by ‖x - x'‖ are injected at most bound · ‖x - x'‖ apart.

    For a map that contracts at rate L < 1 in z, the equilibria are then at most bound / (1 - L) · ‖x - x'‖ apart.

    Args:
        in_features, out_features, bias: those of nn.Linear.
        bound: above 0, on the spectral norm of U (see `spectral_norm`, for its accuracy as well).
        n_power_iterations: at least 1, in each training solve, or None for the exact norm.

    Sources: Gouk et al. 2021, "Regularisation of Neural Networks by Enforcing Lipschitz Continuity"; Prairie
    et al. 2026, "Parcae: Scaling Laws For Stable Looped Language Models", for large norms of the injection as the reason
    why looped models diverge.

    >>> inject = BoundedInjection(16, 32, bound=0.5)
    >>> x = torch.randn(4, 16)
    >>> bool(((inject(x) - inject.bias).norm(dim=1) < 0.51 * x.norm(dim=1)).all())
    True
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        bound: float = 1.0,
        n_power_iterations: int | None = 5,
    ) -> None:
        super().__init__(in_features, out_features, bias)
        spectral_norm(self, bound=bound, n_power_iterations=n_power_iterations)


class DecayInjection(nn.Module):
    """a ∘ z + Δ ∘ (B x), with a = exp(-Δ ∘ e^α) inside (0, 1): the state decays by itself, the input replaces what is lost.

    It is the linear system dz/dt = -e^α ∘ z + B x over a step Δ (per channel, both α and log Δ learned), whose negative
    diagonal keeps it stable whatever is learned. Within a block, f(z, x) = a ∘ z + Δ ∘ (B x) + R(z) contracts wherever R
    is Lipschitz below 1 - max a. It is a whole block as well: DEQ(DecayInjection(...)) finds Δ B x / (1 - a).

    Args:
        in_features: width of x (..., in_features).
        features: width of the state z (..., features).
        step: Δ at the start, above 0; α starts at 0, so that a = e^-step.

    Raises:
        ValueError: step is not above 0.

    Source: Prairie, Novack, Berg-Kirkpatrick and Fu 2026, "Parcae: Scaling Laws For Stable Looped Language Models"; the
    decay is discretised exactly and the input by Euler's rule, as there.

    >>> inject = DecayInjection(3, 4)
    >>> a, injected = inject.prepare(torch.randn(2, 3))
    >>> inject(torch.randn(2, 4), a, injected).shape
    torch.Size([2, 4])
    """

    batch_dims = (None, 0)

    def __init__(self, in_features: int, features: int, *, step: float = 1.0) -> None:
        super().__init__()
        if not 0.0 < step < float("inf"):
            raise ValueError(f"step is {step}; the step Δ must be above 0 and finite")
        self.linear = nn.Linear(in_features, features, bias=False)
        self.log_rate = nn.Parameter(torch.zeros(features))  # α
        self.log_step = nn.Parameter(torch.full((features,), math.log(step)))

    def initial(self, x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:-1], len(self.log_rate))

    def prepare(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(a, Δ ∘ (B x)), of shapes (features,) and (..., features)."""
        step = self.log_step.exp()
        return torch.exp(-step * self.log_rate.exp()), step * self.linear(x)

    def forward(self, z: Tensor, a: Tensor, injected: Tensor) -> Tensor:
        return a * z + injected
