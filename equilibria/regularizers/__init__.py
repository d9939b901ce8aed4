"""What keeps an equilibrium easy to find while its map is trained."""

from equilibria.regularizers.jacobian import jacobian_loss

__all__ = ["jacobian_loss"]
