"""What keeps an equilibrium easy to find while its map is trained."""

from equilibria.regularizers.correction import Recording, fixed_point_correction
from equilibria.regularizers.jacobian import JacobianSchedule, jacobian_loss

__all__ = ["JacobianSchedule", "Recording", "fixed_point_correction", "jacobian_loss"]
