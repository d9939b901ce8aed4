"""The ways of each library to take a step, and the fewest evaluations with which one of them does well enough."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from lm_step.original import MINE, THEIRS
from lm_step.shape import Batch, Side, Solve, error_of
from torch import Tensor

MOST = 60
"""Evaluations, or products, beyond which a way is given up."""

OURS = [
    ("anderson", "gmres"),
    ("broyden", "gmres"),
    ("picard", "gmres"),
    ("anderson", "shine"),
]
ORIGINAL = [(MINE + a, MINE + b) for a in ("anderson", "broyden") for b in ("anderson", "broyden")]
_PICARD = "fixed_point_iter"
_SOLVERS = ("anderson_solver", "broyden_solver", _PICARD)
IN_ORIGINAL = [(THEIRS + a, THEIRS + b) for a in _SOLVERS for b in _SOLVERS if (a == _PICARD) == (b == _PICARD)]
TORCHDEQ = [
    *((a, f"{way} {b}") for way in ("ift", "hook_ift") for a, b in (
        ("anderson", "anderson"), ("anderson", "fixed_point_iter"), ("broyden", "broyden"),
        ("fixed_point_iter", "fixed_point_iter"),
    )),
    ("fixed_point_iter", "unrolled"),
    ("fixed_point_iter", "checkpointed"),
]  # fmt: skip

Reference = Callable[[Tensor], dict[str, Tensor]]
"""The exact gradients at a state."""


@dataclass(frozen=True)
class Way:
    """One way to take a step: a model, what it reads, its solvers by name, and what these may spend."""

    library: str
    side: Side
    batch: Batch
    forward: Solve
    backward: Solve

    @property
    def name(self) -> str:
        """Of its row."""
        model = "" if self.library == self.side.name else f" in the {self.side.name}'s model"
        forward, backward = (
            solve.method.removeprefix(MINE).removeprefix(THEIRS) for solve in (self.forward, self.backward)
        )
        rests = ", samples rest" if self.forward.tol else ""
        return f"{self.library}{model}: {forward}{rests} / {backward}"

    def spending(self, forward: int | None = None, backward: int | None = None, tol: float | None = None) -> Way:
        """The same with other budgets, and another tolerance for samples to rest at."""
        f, b = self.forward, self.backward
        f = f._replace(evaluations=forward or f.evaluations, tol=f.tol if tol is None else tol)
        return dataclasses.replace(self, forward=f, backward=b._replace(evaluations=backward or b.evaluations))

    def step(self) -> float:
        """A training step."""
        self.side.use(self.forward, self.backward)
        return self.side.step(self.batch)

    def evaluate(self) -> float:
        """An evaluation step."""
        self.side.use(self.forward, self.backward)
        return self.side.evaluate(self.batch)

    def residual(self, *, training: bool) -> float:
        """The largest relative residual of a sample at the state that the loss is computed from."""
        self.side.use(self.forward, self.backward)
        return self.side.look(self.batch, training=training).residual

    def error(self, reference: Reference) -> Callable[[int], float]:
        """What relative error the gradient has, by products; the forward solve is taken as it is."""
        self.side.use(self.forward, self.backward)
        exact = reference(self.side.look(self.batch, training=True).state)

        def error(products: int) -> float:
            way = self.spending(backward=products)
            way.side.use(way.forward, way.backward)
            return error_of(way.side.differentiate(way.batch), exact)

        return error


def ways(library: str, side: Side, batch: Batch, methods: list[tuple[str, str]], evaluations: int) -> list[Way]:
    """All of these, each with so many evaluations forward and backward."""
    return [Way(library, side, batch, Solve(a, evaluations), Solve(b, evaluations)) for a, b in methods]


def fewest(does: Callable[[int], bool], least: int = 3, most: int = MOST) -> int | None:
    """The least number from `least` to `most` that does, where all above one that does do too; None for none."""
    low, high = least - 1, least
    while not does(high):
        if high == most:
            return None
        low, high = high, min(2 * high, most)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if does(middle) else (middle, high)
    return high


def solved(way: Way, tol: float, *, training: bool) -> Way | None:
    """With the fewest evaluations that bring every sample to a relative residual of `tol`; None where none do."""

    def does(evaluations: int) -> bool:
        return way.spending(forward=evaluations).residual(training=training) <= tol

    found = fewest(does)
    return None if found is None else way.spending(forward=found)


def trained(way: Way, tol: float, reference: Reference, allowed: float) -> Way | None:
    """As `solved`, and with the fewest products that bring the gradient within `allowed` of the exact one there.

    Where no number of products does, the forward solve gets a quarter more evaluations and half the tolerance, and again.
    """
    found = solved(way, tol, training=True)
    while found is not None and found.forward.evaluations <= MOST:
        error = found.error(reference)
        products = fewest(lambda n, error=error: error(n) <= allowed)
        if products is not None:
            return found.spending(backward=products)
        evaluations, rest = found.forward.evaluations * 5 // 4 + 1, found.forward.tol / 2
        found = found.spending(forward=evaluations, tol=rest)
    return None
