"""Second derivatives of an equilibrium: forces from an energy, and training on forces.

An energy E(x) of atoms at x is read off an equilibrium: every atom's features depend on those of its neighbours, which
depend on its own. Forces are -∂E/∂x, so a loss on forces holds a derivative of the equilibrium already, and its gradient is
a second derivative. It runs through the map at z*, and through the movement of z* itself. Code that keeps only the first
way raises nothing, its forces are right, and the gradient that it trains on is not. Here both are measured.

    python examples/second_order.py
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import tyro
from torch import Tensor, nn

from equilibria import DEQ, Implicit, Stopping


def distances(x: Tensor) -> Tensor:
    """(B, N, 2) -> (B, N, N), with large numbers where an atom would meet itself."""
    apart = x.unsqueeze(2) - x.unsqueeze(1)
    return (apart.square().sum(-1) + 1e4 * torch.eye(x.shape[1], dtype=x.dtype)).sqrt()


def true_energy(x: Tensor) -> Tensor:
    """(B,) of a metal: atoms repel in pairs, and the bond of an atom grows with the root of its neighbours only."""
    r = distances(x)
    return (torch.exp(-4 * (r - 1)).sum(-1) - 2 * torch.exp(-2 * (r - 1)).sum(-1).sqrt()).sum(-1)


class Atoms(nn.Module):
    """z (B, N, width): features of atoms that have made their peace with those of their neighbours."""

    batch_dims = (0, 0)

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.register_buffer("centres", torch.linspace(0.6, 3.0, 12))
        self.inject = nn.Linear(12, width)
        self.own, self.others = nn.Linear(width, width), nn.Linear(width, width)

    def initial(self, x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:2], self.width)

    def prepare(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Once per solve: how much each atom feels each other one, and what it sees around it. Forces flow through both."""
        r = distances(x)
        around = torch.exp(-12 * (r.unsqueeze(-1) - self.get_buffer("centres")).square()).sum(2)
        return torch.exp(-2 * r), self.inject(around)

    def forward(self, z: Tensor, nearness: Tensor, seen: Tensor) -> Tensor:
        return torch.tanh(0.5 * self.own(z) + nearness @ self.others(z) + seen)


class Energy(nn.Module):
    """x (B, N, 2) -> E (B,)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        tight = Stopping(rtol=1e-8)  # what is differentiated twice must be found well
        self.deq = DEQ(Atoms(width), stopping=tight, adjoint=Implicit(stopping=tight))
        self.read = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.deq(x).z).sum((1, 2))


def forces(energy: Tensor, x: Tensor) -> Tensor:
    """-∂E/∂x (B, N, 2), itself differentiable."""
    return -torch.autograd.grad(energy.sum(), x, create_graph=True)[0]


def hooked(model: Energy, x: Tensor) -> Tensor:
    """The same energy by the usual shortcut: one taped evaluation at z*, and a hook that solves for the gradient.

    Its first derivative is exact. Differentiated twice, z* does not move.
    """
    block = model.deq.block
    args, z = block.prepare(x), model.deq(x).z.detach().requires_grad_()
    taped, out = block(z, *args), block(z.detach(), *args)

    def solve(gradient: Tensor) -> Tensor:
        u = gradient
        for _ in range(100):
            u = gradient + torch.autograd.grad(taped, z, u, create_graph=True)[0]
        return u

    out.register_hook(solve)
    return model.read(out).sum((1, 2))


class Result(NamedTuple):
    gradient_error: float
    """Of the gradient of the force loss, relative to a finite difference."""
    shortcut_error: float
    """Of the gradient had with the energy `hooked`, relative to the right one."""
    before: float
    """Root mean square error of forces on new configurations, relative to that of saying 0; before training."""
    after: float


def main(width: int = 24, atoms: int = 6, steps: int = 600, batch: int = 16, seed: int = 0) -> Result:
    """Check second derivatives, then train on forces.

    Args:
        width: features of an atom.
        atoms: in a configuration.
        steps: of training.
        batch: configurations in a step.
        seed: of everything random.
    """
    torch.manual_seed(seed)
    model = Energy(width).double()

    def configurations(count: int) -> tuple[Tensor, Tensor]:
        """Atoms near the places of a lattice, and the forces on them."""
        lattice = torch.cartesian_prod(torch.arange(2.0), torch.arange((atoms + 1) // 2).float())[:atoms]
        x = (lattice.double() + 0.15 * torch.randn(count, atoms, 2, dtype=torch.float64)).requires_grad_()
        return x, forces(true_energy(x), x).detach()

    def loss(x: Tensor, target: Tensor) -> Tensor:
        return (forces(model(x), x) - target).square().mean()

    x, target = configurations(4)
    weight = model.deq.block.own.weight
    direction, original = torch.randn_like(weight), weight.detach().clone()

    def moved(step: float) -> Tensor:
        weight.data = original + step * direction
        return loss(x, target).detach()

    finite = (moved(1e-4) - moved(-1e-4)) / 2e-4
    moved(0.0)
    both = torch.autograd.grad(loss(x, target), weight)[0]
    one = torch.autograd.grad((forces(hooked(model, x), x) - target).square().mean(), weight)[0]
    gradient_error = float(((both * direction).sum() - finite).abs() / finite.abs())
    shortcut_error = float((one - both).norm() / both.norm())
    torch.autograd.gradgradcheck(model, (x[:1],))  # every second derivative in x; raises where one is wrong
    print(f"gradient of the force loss, off its finite difference by  {gradient_error:.0e}")
    print(f"with z* held still, as by the usual shortcut, off by      {shortcut_error:.0%}")

    new, new_target = configurations(64)

    def relative_error() -> float:
        return float((loss(new, new_target).detach() / new_target.square().mean()).sqrt())

    before = relative_error()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(*configurations(batch)).backward()
        optimizer.step()
        schedule.step()
    after = relative_error()
    print(f"error of forces on new configurations                     {before:.0%} before, {after:.1%} after training")
    return Result(gradient_error, shortcut_error, before, after)


if __name__ == "__main__":
    torch.set_num_threads(1)
    tyro.cli(main, description=__doc__)
