"""Finding the way through mazes: trained on small ones, larger ones are solved by iterating longer.

A maze is a tree of n x n cells with two of them marked; which cells lie on the way between the marks? The state holds a
message for each door of each cell, and f sends new ones: what leaves through a door depends on what came in by the others.
Nothing in f knows the size of the maze, and the equilibrium is the same function of it at any size; only the evaluations
that it takes to get there grow. So the budget is chosen at test time:

    python examples/looped_reasoning.py

It works only if the answer does not depend on the way to it. A message never returns through the door it came by, so on a
tree ∂f/∂z is nilpotent: whatever the weights, there is one equilibrium, and plain iteration reaches it from anywhere. So
that training relies on the equilibrium alone, it draws the budget of every solve and starts every other one from noise. The
table has a column for mazes solved from noise as well.

Sources: Schwarzschild et al. 2021, "Can you learn an algorithm?"; Bansal et al. 2022, "End-to-end algorithm synthesis with
recurrent networks"; Anil et al. 2022, "Path independent equilibrium models can better exploit test-time computation".
"""

from __future__ import annotations

import random
from typing import NamedTuple

import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional as F

from equilibria import DEQ, Implicit, Picard, Stats, Stopping

STEPS = ((-1, 0), (0, 1), (1, 0), (0, -1))  # through the doors of a cell: to row and column beside it


def maze(n: int, draw: random.Random) -> tuple[Tensor, Tensor, Tensor]:
    """Doors (n, n, 4) of a tree drawn by a walk that turns back at dead ends, marks (n, n, 1), way (n, n); 0 or 1 each."""
    doors, marks, way = torch.zeros(n, n, 4), torch.zeros(n, n, 1), torch.zeros(n, n)
    start = (draw.randrange(n), draw.randrange(n))
    walk, to_start = [start], {start: [start]}  # every cell's way to the start
    while walk:
        r, c = walk[-1]
        near = [(k, (r + dr, c + dc)) for k, (dr, dc) in enumerate(STEPS) if 0 <= r + dr < n and 0 <= c + dc < n]
        if not (new := [(k, cell) for k, cell in near if cell not in to_start]):
            walk.pop()
            continue
        k, cell = draw.choice(new)
        doors[r, c, k] = doors[cell][(k + 2) % 4] = 1
        to_start[cell] = [cell, *to_start[r, c]]
        walk.append(cell)
    a, b = draw.sample(sorted(to_start), 2)
    marks[a] = marks[b] = 1
    shared = set(to_start[a]) & set(to_start[b])
    junction = max(shared, key=lambda cell: len(to_start[cell]))
    for cell in (set(to_start[a]) ^ set(to_start[b])) | {junction}:
        way[cell] = 1
    return doors, marks, way


def mazes(count: int, n: int, draw: random.Random) -> tuple[Tensor, ...]:
    return tuple(torch.stack(parts) for parts in zip(*(maze(n, draw) for _ in range(count)), strict=True))


class Messages(nn.Module):
    """z (B, n, n, 4, width): what each cell has heard through each of its doors."""

    batch_dims = (0, 0)

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.mark, self.heard, self.say = nn.Linear(1, width), nn.Linear(width, width), nn.Linear(width, width)

    def initial(self, doors: Tensor, marks: Tensor) -> Tensor:
        return doors.new_zeros(*doors.shape, self.width)

    def prepare(self, doors: Tensor, marks: Tensor) -> tuple[Tensor, Tensor]:
        return doors.unsqueeze(-1), self.mark(marks).unsqueeze(3)

    def forward(self, z: Tensor, doors: Tensor, mark: Tensor) -> Tensor:
        others = z.sum(3, keepdim=True) - z
        said = torch.tanh(self.say(F.relu(self.heard(others) + mark)))
        heard = [said[:, :, :, (k + 2) % 4].roll((-dr, -dc), (1, 2)) for k, (dr, dc) in enumerate(STEPS)]
        return torch.stack(heard, 3) * doors  # nothing comes through walls


class Solver(nn.Module):
    """Doors and marks of a maze -> for each cell, the logit of being on the way."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        backward = Implicit(stopping=Stopping(rtol=1e-2, max_evals=60))
        self.deq = DEQ(Messages(width), solver=Picard(), adjoint=backward)
        self.read = nn.Sequential(nn.Linear(width + 1, width), nn.ReLU(), nn.Linear(width, 1))

    def forward(self, doors: Tensor, marks: Tensor, budget: int, *, noise: bool = False) -> tuple[Tensor, Stats]:
        z0 = 2 * torch.rand(*doors.shape, self.width) - 1 if noise else None
        z, stats = self.deq(doors, marks, z0=z0, stopping=Stopping(rtol=1e-3, max_evals=budget))
        return self.read(torch.cat([z.sum(3), marks], -1)).squeeze(-1), stats


def train(model: Solver, steps: int, batch: int, sizes: range, draw: random.Random) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        doors, marks, way = mazes(batch, draw.choice(sizes), draw)
        logits, stats = model(doors, marks, draw.randint(20, 60), noise=step % 2 == 1)
        loss = F.binary_cross_entropy_with_logits(logits, way)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step:5}  loss {loss.item():.4f}  evaluations {stats.evaluations}")


class Row(NamedTuple):
    """Shares of mazes of one size of which every cell is right."""

    solved: list[float]
    """For each budget."""
    from_noise: float
    """At the largest budget, searched from noise."""
    evaluations: int
    """Spent at the largest budget."""


@torch.no_grad()
def test(model: Solver, n: int, budgets: tuple[int, ...], count: int, draw: random.Random) -> Row:
    doors, marks, way = mazes(count, n, draw)

    def solved(budget: int, noise: bool = False) -> tuple[float, int]:
        logits, stats = model(doors, marks, budget, noise=noise)
        return ((logits > 0) == (way > 0)).flatten(1).all(1).double().mean().item(), stats.evaluations

    shares, evaluations = zip(*(solved(budget) for budget in budgets), strict=True)
    return Row(list(shares), solved(budgets[-1], noise=True)[0], evaluations[-1])


def main(
    steps: int = 2500,
    largest: int = 8,
    test_sizes: tuple[int, ...] = (8, 11, 16, 23),
    budgets: tuple[int, ...] = (10, 20, 40, 80, 160, 320),
    count: int = 200,
    width: int = 16,
    seed: int = 0,
) -> dict[int, Row]:
    """Train on mazes of 3 x 3 up to largest x largest cells, then solve larger ones with growing budgets.

    Args:
        steps: of training, 32 mazes each.
        largest: cells along a side of the largest mazes to train on.
        test_sizes: cells along a side of the mazes to solve.
        budgets: evaluations of f that a solve may spend.
        count: mazes of each size.
        width: numbers in a message.
        seed: of everything random.
    """
    torch.manual_seed(seed)
    model, draw = Solver(width), random.Random(seed)
    train(model, steps, 32, range(3, largest + 1), draw)
    print("mazes solved  " + "".join(f"{b:>8}" for b in budgets) + "  from noise  evaluations used")
    rows = {n: test(model, n, budgets, count, draw) for n in test_sizes}
    for n, row in rows.items():
        shares = "".join(f"{s:8.1%}" for s in row.solved)
        print(f"{n:4} x {n:<4}   {shares}{row.from_noise:12.1%}{row.evaluations:18}")
    return rows


if __name__ == "__main__":
    torch.set_num_threads(1)
    tyro.cli(main, description=__doc__)
