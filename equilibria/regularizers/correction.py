"""Sparse fixed-point correction: a loss on a few states that the solve passed on its way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor

from equilibria.adjoints import Phantom
from equilibria.declared import Declared
from equilibria.solution import Solution, Status
from equilibria.solvers import GMRES, Solver
from equilibria.solvers.solver import Map, State, check_choice
from equilibria.structure import layout_of


@dataclass(frozen=True, kw_only=True)
class RecordingState(State):
    inner: State
    """Of the solver that is recorded."""
    rows: Tensor
    """(B,) which samples of the whole batch these are."""
    step: int

    def take(self, rows: Tensor) -> Self:
        return replace(super().take(rows), inner=self.inner.take(rows))


class Recording:
    """A solver that takes the steps of another and keeps z after some of them, without gradient.

    It is good for one solve at a time: the next one overwrites what the last one kept. `states` then attaches what was kept
    to autograd. No evaluation is added to the solve. `Shine` and `Reversible`, which need to know their solver, refuse it.

    Args:
        solver: the solver to record, such as `Anderson()`.
        at: steps (0 is z0) after which z is kept, increasing.

    Source: Bai, Geng, Savani and Kolter 2022, "Deep equilibrium optical flow estimation", on sparse fixed-point
    correction.

    >>> import torch
    >>> from equilibria import Anderson, fixed_point
    >>> x, y = torch.randn(2, 4), torch.randn(2, 4)
    >>> W = (0.1 * torch.randn(4, 4)).requires_grad_()
    >>> def f(z, W, x):
    ...     return torch.tanh(z @ W + x)
    >>> recording = Recording(Anderson(), at=(1, 3))
    >>> solution = fixed_point(f, torch.zeros(2, 4), W, x, solver=recording)
    >>> states = recording.states(f, solution, W, x)
    >>> fixed_point_correction(lambda z: (z - y).square().mean(), [*states, solution.z]).backward()
    """

    def __init__(self, solver: Solver[Any], *, at: Sequence[int]) -> None:
        check_choice("solver", solver, ("init", "step"), "Anderson()")
        if isinstance(solver, GMRES):
            raise TypeError("Recording(GMRES()): GMRES solves affine maps alone; record Anderson(), Broyden() or Picard()")
        steps = tuple(at)
        if not steps or any(not isinstance(k, int) or k < 0 for k in steps) or list(steps) != sorted(set(steps)):
            raise ValueError(f"Recording(at={at!r}): at must be increasing steps >= 0, such as (4, 8)")
        self.solver = solver
        self.at = steps
        self._kept: dict[int, Tensor] = {}  # step -> (B, D)
        self._batch = 0

    def __repr__(self) -> str:
        return f"Recording({self.solver!r}, at={self.at})"

    def init(self, f: Map, z0: Tensor) -> RecordingState:
        self._kept, self._batch = {}, len(z0)
        inner = self.solver.init(f, z0)
        return self._keep(inner, torch.arange(len(z0), device=z0.device), 0)

    def step(self, f: Map, state: RecordingState) -> RecordingState:
        return self._keep(self.solver.step(f, state.inner), state.rows, state.step + 1)

    def _keep(self, inner: State, rows: Tensor, step: int) -> RecordingState:
        if step in self.at:
            z = inner.z.detach().clone() if step == 0 else inner.z.detach()  # z0 is the caller's, who may write into it
            whole = len(rows) == self._batch
            self._kept[step] = z if whole else z.new_zeros(self._batch, z.shape[1]).index_copy(0, rows, z)
        common = {field.name: getattr(inner, field.name) for field in fields(State)}
        return RecordingState(**common, inner=inner, rows=rows, step=step)

    def states(self, f: Callable[..., Any], solution: Solution, *args: Any, phantom: Phantom | None = None) -> list[Any]:
        """What was kept in the solve that gave `solution`, attached to autograd: f(z_k, *args) for every step k in `at`.

        A sample that had stopped before step k takes part with the z that was returned for it, so that its states do not
        depend on its batch. Costs one evaluation of f per state and holds its activations until the backward pass.

        Args:
            f: the map that was solved.
            solution: what `fixed_point` or `DEQ` returned.
            args: the other arguments of f, those of the solve.
            phantom: how many steps of f to record from z_k, and how much they are damped: `Phantom()`, one undamped step.

        Returns:
            A state in the structure of z for each step in `at`.
        """
        layout = layout_of(solution.z)
        phantom = Phantom() if phantom is None else phantom
        if layout.batch != self._batch:
            raise ValueError(
                f"the last solve of this recording was of {self._batch} samples and the solution has {layout.batch}; call "
                "states right after the solve, outside of torch.vmap, with a Recording as its solver"
            )
        declared = Declared(f, layout, args, None)
        returned = layout.pack(solution.z).detach()
        stats = solution.stats
        last = stats.steps - (stats.status == Status.NONFINITE).long()  # step at which f(z) was finite and z not frozen
        states = []
        for k in self.at:
            z = torch.where((last >= k).unsqueeze(1), self._kept.get(k, returned), returned)
            states.append(layout.unpack(phantom.walk(declared, z, declared.tensors)))
        return states


def fixed_point_correction(loss: Callable[[Any], Tensor], states: Sequence[Any], *, gamma: float = 0.8) -> Tensor:
    """Σ γⁿ⁻ⁱ loss(zᵢ) over the states z₁ ... zₙ of a solve: the nearer to its end, the more a state counts.

    The last state, usually the fixed point itself, counts fully. Pulling states on the way to the target as well makes the
    path to the equilibrium short and stable.

    Args:
        loss: of one state, a tensor.
        states: in the order of the solve: those of `Recording.states`, then the solution's z.
        gamma: in (0, 1].

    Source: Bai, Geng, Savani and Kolter 2022, "Deep equilibrium optical flow estimation", on sparse fixed-point
    correction.

    >>> import torch
    >>> float(fixed_point_correction(torch.sum, [torch.ones(2), torch.ones(2)], gamma=0.5))
    3.0
    """
    if not 0.0 < gamma <= 1.0:
        raise ValueError(f"fixed_point_correction(gamma={gamma}): gamma must lie in (0, 1]; 1 weighs all states alike")
    if not states:
        raise ValueError("fixed_point_correction: there are no states; give those of Recording.states and the solution's z")
    total = loss(states[-1])
    for distance, state in enumerate(reversed(states[:-1]), start=1):
        total = total + gamma**distance * loss(state)
    return total
