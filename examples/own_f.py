"""Your own f: cross-attention to a fixed memory, with what does not move computed once.

A few slots z look at a long input x and at themselves until they agree. Keys and values of x are the same in every
evaluation, so they do not belong into f: a block's `prepare` makes them once per solve, and `forward` takes them as
arguments. Gradients flow through `prepare` as through any other code. The same block without this split gives the same
numbers for more work; both are timed here. Then solvers and adjoints are exchanged, and the equilibrium is looked at.

    python examples/own_f.py
"""

from __future__ import annotations

import statistics
import time
from typing import NamedTuple

import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional as F

from equilibria import DEQ, Anderson, Broyden, Implicit, NewtonKrylov, Phantom, Picard, Shine, Stats, Stopping
from equilibria.diagnostics import summary
from equilibria.nn import weight_norm


class Slots(nn.Module):
    """z (B, slots, d) looking at x (B, length, d)."""

    batch_dims = (0, 0)  # of keys and values; with it, samples that need longer go on in a smaller batch

    def __init__(self, slots: int, d: int) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.randn(slots, d))
        self.query, self.key, self.value = (weight_norm(nn.Linear(d, d)) for _ in range(3))  # normalised once per solve
        self.mix = nn.utils.parametrizations.orthogonal(nn.Linear(d, d))

    def initial(self, x: Tensor) -> Tensor:
        """Where the search begins. It does not change the equilibrium, so it gets no gradient."""
        return x.new_zeros(len(x), *self.start.shape)

    def prepare(self, x: Tensor) -> tuple[Tensor, ...]:
        """Once per solve."""
        return self.key(x), self.value(x)

    def forward(self, z: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Each evaluation."""
        read = F.softmax(self.query(z) @ keys.mT * keys.shape[-1] ** -0.5, -1) @ values
        return torch.tanh(self.mix(z) + read + self.start)


class NothingPrepared(Slots):
    """The same map, with keys and values computed in every evaluation."""

    batch_dims = (0,)

    def prepare(self, x: Tensor) -> tuple[Tensor, ...]:
        return (x,)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().forward(z, *super().prepare(x))


class Result(NamedTuple):
    speedup: float
    """Processor time of a step with nothing prepared, in units of one with `prepare`."""
    difference: float
    """Of the gradients of the two, relative to their norm."""
    unconverged: dict[str, float]
    """For each solver, the share of samples that did not reach the tolerance."""
    gradient_errors: dict[str, float]
    """For each adjoint, relative to gradients solved tightly."""


def gradients(layer: DEQ, x: Tensor) -> tuple[Tensor, Stats]:
    """The gradient of a loss for all parameters, in one vector, and the statistics of the solve."""
    layer.zero_grad()
    z, stats = layer(x)
    z[..., 0].square().mean().backward()
    return torch.cat([p.grad.flatten() for p in layer.parameters() if p.grad is not None]), stats


def main(slots: int = 4, length: int = 512, d: int = 128, batch: int = 8, rounds: int = 9, seed: int = 0) -> Result:
    """Time `prepare`, then compare solvers and adjoints.

    Args:
        slots: of the state.
        length: of the input.
        d: numbers in a slot, and in an input vector.
        batch: samples.
        rounds: of timing.
        seed: of parameters and inputs.
    """
    torch.manual_seed(seed)
    prepared = DEQ(Slots(slots, d), stopping=Stopping(rtol=1e-5))
    plain = DEQ(NothingPrepared(slots, d), stopping=Stopping(rtol=1e-5))
    plain.load_state_dict(prepared.state_dict())
    x = torch.randn(batch, length, d)

    (wanted, stats), (other, _) = gradients(prepared, x), gradients(plain, x)
    difference = float((wanted - other).norm() / wanted.norm())
    seconds: dict[DEQ, list[float]] = {prepared: [], plain: []}
    for _ in range(rounds):
        for layer, times in seconds.items():
            begin = time.process_time()
            gradients(layer, x)
            times.append(time.process_time() - begin)
    once, always = (statistics.median(times) for times in seconds.values())
    spent = f"{stats.evaluations} evaluations and {stats.backward[0].evaluations} products"
    print(f"forward and backward, {spent}:")
    print(
        f"  keys and values prepared {1e3 * once:.1f} ms, in every evaluation {1e3 * always:.1f} ms: {always / once:.1f}x"
    )
    print(f"  their gradients differ by {difference:.0e}")

    print("solver          evaluations  worst residual")  # any of them, exchanged at any time
    unconverged = {}
    for solver in (Picard(), Anderson(), Broyden(), NewtonKrylov()):
        prepared.solver = solver
        with torch.no_grad():
            stats = prepared(x).stats
        name = type(solver).__name__
        unconverged[name] = 1 - stats.converged.double().mean().item()
        print(f"{name:16}{stats.evaluations:11}{stats.relative.max().item():16.0e}")

    print("adjoint         error of the gradient")
    prepared.solver, prepared.stopping = Anderson(), Stopping(rtol=1e-6)
    prepared.adjoint = Implicit(stopping=Stopping(rtol=1e-6))
    exact, errors = gradients(prepared, x)[0], {}
    adjoints = {
        "Implicit": Implicit(),
        "Shine": Shine(),
        "Phantom, 5 steps": Phantom(steps=5),
        "Phantom, 1 step": Phantom(),
    }
    for name, adjoint in adjoints.items():
        prepared.adjoint = adjoint
        errors[name] = float((gradients(prepared, x)[0] - exact).norm() / exact.norm())
        print(f"{name:16}{errors[name]:21.0e}")

    prepared.adjoint = Implicit()
    print(summary(prepared, x))
    return Result(always / once, difference, unconverged, errors)


if __name__ == "__main__":
    torch.set_num_threads(1)
    tyro.cli(main, description=__doc__)
