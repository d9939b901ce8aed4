"""Ways to differentiate a fixed point, one file each."""

from equilibria.adjoints.adjoint import Adjoint, Forward, Function
from equilibria.adjoints.implicit import Implicit
from equilibria.adjoints.neumann import Neumann
from equilibria.adjoints.phantom import Phantom
from equilibria.adjoints.reversible import Reversible
from equilibria.adjoints.shine import Shine
from equilibria.adjoints.unrolled import Unrolled

__all__ = ["Adjoint", "Forward", "Function", "Implicit", "Neumann", "Phantom", "Reversible", "Shine", "Unrolled"]
