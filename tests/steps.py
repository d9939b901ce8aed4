"""A solver driven by hand, step by step, to compare its iterates with those of a textbook."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from equilibria.products import linearize


class Unlimited:
    """A map of flat states (B, D) with a budget that never ends."""

    remaining = 10**6

    def __init__(self, f: Callable[[Tensor], Tensor]) -> None:
        self.f = f

    def __call__(self, z: Tensor, /) -> Tensor:
        return self.f(z)

    def linearize(self, z: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        return linearize(self.f, z)


def iterates(solver: Any, f: Callable[[Tensor], Tensor], z0: Tensor, steps: int) -> list[Tensor]:
    """[z0, z1, ...], each (B, D). Checks on the way that the state knows f at each of them, to rounding."""
    known = Unlimited(f)
    state = solver.init(known, z0)
    found = []
    for step in range(steps + 1):
        if step:
            state = solver.step(known, state)
        found.append(state.z.clone())
        assert torch.allclose(state.fz, f(state.z), rtol=1e-12, atol=1e-12)
        assert torch.allclose(state.g, f(state.z) - state.z, rtol=1e-12, atol=1e-12)
    return found
