"""Root solvers, one file per method."""

from equilibria.solvers.anderson import Anderson
from equilibria.solvers.broyden import Broyden
from equilibria.solvers.gmres import GMRES
from equilibria.solvers.newton_krylov import NewtonKrylov
from equilibria.solvers.peaceman_rachford import PeacemanRachford
from equilibria.solvers.picard import Picard
from equilibria.solvers.reversible import ReversiblePicard
from equilibria.solvers.solver import Map, Solver, State

__all__ = [
    "GMRES",
    "Anderson",
    "Broyden",
    "Map",
    "NewtonKrylov",
    "PeacemanRachford",
    "Picard",
    "ReversiblePicard",
    "Solver",
    "State",
]
