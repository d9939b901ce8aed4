"""An inverse problem: sharpening blurred signals by a learned step that is iterated until it rests.

A signal x is seen as y = A x + noise, where A blurs. Undoing A alone would blow up the noise; what signals are like must
come in as well. So a step down the misfit is followed by a small network that moves towards what signals are like,

    f(z, y) = s + net(s),   s = shrink · z - Aᵀ(A z - y),

and repeated. Trained through ten steps, the network is right after ten and goes astray when it is iterated on. Trained at
the equilibrium, with a penalty on the Jacobian that keeps f contracting, it may be iterated as long as one likes.

    python examples/inverse_problem.py

Source: Gilton, Ongie and Willett 2021, "Deep equilibrium architectures for inverse problems in imaging".
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional as F

from equilibria import DEQ, Implicit, Stopping
from equilibria.nn import stack
from equilibria.regularizers import jacobian_loss

SHRINK = 0.8  # what A has removed cannot be had back from y: without shrinking, nothing would hold it at first
DEPTHS = (5, 10, 20, 50, 100)


def blur(x: Tensor) -> Tensor:
    """A x, which is Aᵀ x too, for the kernel is symmetric: (B, 1, L) -> (B, 1, L)."""
    kernel = torch.exp(-torch.arange(-6.0, 7.0).square() / 8)
    return F.conv1d(x, (kernel / kernel.sum()).view(1, 1, -1), padding="same")


def signals(count: int, length: int) -> tuple[Tensor, Tensor]:
    """Signals that jump now and then, (B, 1, L), and what is seen of them."""
    jumps = torch.randn(count, 1, length) * (torch.rand(count, 1, length) < 8 / length)
    x = jumps.cumsum(-1) - jumps.sum(-1, keepdim=True) / 2
    return x, blur(x) + 0.02 * torch.randn_like(x)


class Step(nn.Module):
    """f(z, y): down the misfit, then towards what signals are like."""

    batch_dims = (0,)

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv1d(1, channels, 7, padding="same"), nn.ReLU(),
            nn.Conv1d(channels, channels, 7, padding="same"), nn.ReLU(),
            nn.Conv1d(channels, 1, 7, padding="same"),
        )  # fmt: skip

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        s = SHRINK * z - blur(blur(z) - y)
        return s + self.net(s)


def train(block: Step, equilibrium: bool, steps: int, batch: int, length: int) -> None:
    stopping = Stopping(rtol=1e-3, max_evals=40)
    layer = DEQ(block, stopping=stopping, adjoint=Implicit(stopping=stopping))
    optimizer = torch.optim.Adam(block.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        x, y = signals(batch, length)
        z = layer(y).z if equilibrium else stack(block, 10, y)
        loss = (z - x).square().mean()
        if equilibrium:
            loss = loss + 0.02 * jacobian_loss(block, z.detach(), y)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(block.parameters(), 1.0)
        optimizer.step()
        schedule.step()


def decibels(z: Tensor, x: Tensor) -> float:
    """How far the error of z lies below the signal x."""
    return float(10 * (x.square().mean() / (z - x).square().mean()).log10())


class Result(NamedTuple):
    """Decibels on new signals; in the lists, after so many steps as `DEPTHS` says."""

    seen: float
    """Of y itself."""
    through_ten_steps: list[float]
    at_the_equilibrium: list[float]


def main(steps: int = 600, channels: int = 24, length: int = 96, batch: int = 16, seed: int = 0) -> Result:
    """Train a step in both ways, then iterate it for longer and longer.

    Args:
        steps: of training.
        channels: of the network.
        length: of a signal.
        batch: signals in a step of training.
        seed: of everything random.
    """
    torch.manual_seed(seed)
    x, y = signals(200, length)
    print(f"as seen: {decibels(y, x):.1f} dB\nafter steps of f         " + "".join(f"{depth:8}" for depth in DEPTHS))
    rows = []
    for name, equilibrium in {"trained through ten": False, "trained at equilibrium": True}.items():
        block = Step(channels)
        train(block, equilibrium, steps, batch, length)
        with torch.no_grad():
            rows.append([decibels(stack(block, depth, y), x) for depth in DEPTHS])
        print(f"{name:25}" + "".join(f"{quality:8.1f}" for quality in rows[-1]))
    return Result(decibels(y, x), *rows)


if __name__ == "__main__":
    torch.set_num_threads(1)
    tyro.cli(main, description=__doc__)
