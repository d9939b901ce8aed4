"""Deep equilibrium models: the fixed point of a layer, found by a root solver, differentiated implicitly.

>>> import torch, equilibria as eq
>>> x = torch.randn(4, 16)
>>> z, stats = eq.fixed_point(lambda z, x: torch.tanh(0.5 * z + x), torch.zeros_like(x), x)
"""

from equilibria import starting as starting  # before what takes its time

# isort: split
from equilibria import diagnostics as diagnostics
from equilibria import models as models
from equilibria import nn as nn
from equilibria import regularizers as regularizers
from equilibria.adjoints import Implicit, Neumann, Phantom, Reversible, Shine, Unrolled
from equilibria.fixed_point import fixed_point
from equilibria.nn.deq import DEQ
from equilibria.solution import (
    EquilibriaError,
    NonFiniteError,
    RandomMapError,
    ReconstructionError,
    Solution,
    Stats,
    Status,
    UndeclaredTensorError,
    UserError,
)
from equilibria.solvers import GMRES, Anderson, Broyden, NewtonKrylov, PeacemanRachford, Picard, ReversiblePicard
from equilibria.stopping import Stopping

__version__ = "0.1.0"

__all__ = [
    "DEQ",
    "GMRES",
    "Anderson",
    "Broyden",
    "EquilibriaError",
    "Implicit",
    "Neumann",
    "NewtonKrylov",
    "NonFiniteError",
    "PeacemanRachford",
    "Phantom",
    "Picard",
    "RandomMapError",
    "ReconstructionError",
    "Reversible",
    "ReversiblePicard",
    "Shine",
    "Solution",
    "Stats",
    "Status",
    "Stopping",
    "UndeclaredTensorError",
    "Unrolled",
    "UserError",
    "fixed_point",
]
