"""Handwritten digits by a convolutional equilibrium, beside its explicit twin.

Both have the same parameters: a stem that turns an image into features u (B, C, 7, 7), one residual block f(z, u), a linear
layer. The equilibrium solves z = f(z, u); the twin applies f a fixed number of times and backpropagates through all of it.
What keeps an equilibrium of images well-behaved: normalised weights and states, the input added in every evaluation, and
a penalty on the Jacobian, which keeps solves short.

    python examples/mnist.py --folder MNIST

where MNIST holds the four files of the data set, `train-images-idx3-ubyte.gz` and so on. Without it digits are drawn: pixel
numerals, turned, moved, stretched and blurred.

Sources: Bai, Koltun and Kolter 2020, "Multiscale deep equilibrium models", for the block; the same 2021, "Stabilizing
equilibrium models by Jacobian regularization".
"""

from __future__ import annotations

import gzip
import os
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional as F

from equilibria import DEQ, Anderson, Implicit, Stats, Stopping
from equilibria.nn import computed_once, stack, weight_norm
from equilibria.regularizers import JacobianSchedule, jacobian_loss
from equilibria.train.memory import PeakMemory

PEN = float(os.environ.get("PEN", "0.5"))
Data = tuple[Tensor, Tensor]
"""Images (N, 1, 28, 28), dark about 0 and light about 1, and labels (N,)."""


def read(folder: Path, part: str, count: int) -> Data:
    def numbers(name: str, header: int) -> Tensor:
        content = gzip.decompress((folder / f"{part}-{name}-ubyte.gz").read_bytes())
        return torch.frombuffer(bytearray(content[header:]), dtype=torch.uint8)

    images, labels = numbers("images-idx3", 16).view(-1, 1, 28, 28), numbers("labels-idx1", 8)
    return images[:count] / 255, labels[:count].long()


def draw(count: int) -> Data:
    numerals = "75557262277174771717557117471774757711117575775717"  # each 5 rows of 3 bits
    pixels = torch.tensor([[int(row) >> k & 1 for k in (2, 1, 0)] for row in numerals]).view(10, 5, 3).float()
    labels = torch.randint(10, (count,))
    large = F.pad(F.interpolate(pixels[labels].unsqueeze(1), (20, 12)), (8, 8, 4, 4))
    where = torch.eye(2, 3) + torch.tensor([[0.15, 0.15, 0.1], [0.15, 0.15, 0.1]]) * torch.randn(count, 2, 3)
    moved = F.grid_sample(large, F.affine_grid(where, list(large.shape), align_corners=False), align_corners=False)
    return F.avg_pool2d(moved, 3, 1, 1) + 0.1 * torch.randn_like(large), labels


class Block(nn.Module):
    """f(z, u) = norm(relu(z + norm(u + W₂ norm(relu(W₁ z))))), with 3 x 3 convolutions W₁ and W₂."""

    batch_dims = (0,)

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = (weight_norm(nn.Conv2d(channels, channels, 3, padding=1)) for _ in range(2))
        self.inner, self.middle, self.outer = (nn.GroupNorm(4, channels) for _ in range(3))

    def forward(self, z: Tensor, u: Tensor) -> Tensor:
        h = self.inner(F.relu(self.first(z)))
        return self.outer(F.relu(z + self.middle(u + self.second(h))))


class Classifier(nn.Module):
    """Images -> logits (B, 10). depth: how often the twin applies its block; None for the equilibrium."""

    def __init__(self, channels: int, depth: int | None) -> None:
        super().__init__()
        self.depth = depth
        self.stem = nn.Sequential(
            nn.Conv2d(1, channels, 5, stride=2, padding=2), nn.GroupNorm(4, channels), nn.ReLU(),
            nn.Conv2d(channels, channels, 3, stride=2, padding=1), nn.GroupNorm(4, channels),
        )  # fmt: skip
        stopping = Stopping(rtol=1e-2, max_evals=20)  # loose: what is read off z* is one of ten digits
        self.layer = DEQ(
            Block(channels), solver=Anderson(history=6), stopping=stopping, adjoint=Implicit(stopping=stopping)
        )
        self.read = nn.Linear(49 * channels, 10)

    def forward(self, images: Tensor, penalty: float = 0.0) -> tuple[Tensor, Tensor, Stats | None]:
        """Logits, the penalty on the Jacobian, and statistics of the solve; of these, the twin has neither."""
        u, block, extra = self.stem(images), self.layer.block, torch.zeros(())
        if self.depth is not None:
            return self.read(stack(block, self.depth, u).flatten(1)), extra, None
        with computed_once(block):  # the penalty sees the normalised weights of the solve
            z, stats = self.layer(u)
            if penalty:
                extra = penalty * jacobian_loss(block, z.detach(), u)
        return self.read(z.flatten(1)), extra, stats


class Outcome(NamedTuple):
    accuracy: float
    """On images that were not trained on."""
    evaluations: float
    """Of f, in the mean over the solves of the test; of the twin, its depth."""
    seconds: float
    """Of processor time for a training step, the median."""
    peak_mib: float
    """Of memory that one training step takes."""


def train(model: Classifier, data: Data, epochs: int, batch: int) -> float:
    """Median seconds of a step, of processor time, which neighbours on the machine do not change much."""
    images, labels = data
    steps = epochs * len(images.split(batch))
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    penalty, times = JacobianSchedule(weight=1.0, share=0.25), []
    for step, picked in enumerate(rows for _ in range(epochs) for rows in torch.randperm(len(images)).split(batch)):
        begin = time.process_time()
        logits, extra, stats = model(images[picked], penalty(step))
        loss = F.cross_entropy(logits, labels[picked])
        optimizer.zero_grad()
        (loss + extra).backward()
        optimizer.step()
        schedule.step()
        times.append(time.process_time() - begin)
        if step % 200 == 0:
            spent = f"  evaluations {stats.evaluations}, backward {stats.backward[0].evaluations}" if stats else ""
            print(f"step {step:5} of {steps}  loss {loss.item():.4f}{spent}")
    return statistics.median(times)


def memory(model: Classifier, data: Data, batch: int) -> float:
    """MiB that a forward and a backward pass take at their peak, the penalty included."""
    peak = PeakMemory(torch.device("cpu"))
    before = peak.read()
    logits, extra, _ = model(data[0][:batch], penalty=1.0)
    (F.cross_entropy(logits, data[1][:batch]) + extra).backward()
    return (peak.read() - before) / 2**20


@torch.no_grad()
def test(model: Classifier, data: Data) -> tuple[float, float]:
    """Accuracy and mean evaluations."""
    model.eval()
    right, evaluations = 0, []
    for images, labels in zip(data[0].split(250), data[1].split(250), strict=True):
        logits, _, stats = model(images)
        right += int((logits.argmax(1) == labels).sum())
        evaluations.append(stats.evaluations if stats else model.depth)
    return right / len(data[0]), statistics.mean(evaluations)


def main(
    folder: Path | None = None, train_images: int = 60_000, test_images: int = 10_000, epochs: int = 3, batch: int = 100,
    channels: int = 24, depth: int = 10, seed: int = 0,
) -> dict[str, Outcome]:  # fmt: skip
    """Train the equilibrium, then its twin, on the same images in the same order.

    Args:
        folder: with the files of MNIST; without it, digits are drawn.
        train_images: how many, at most.
        test_images: how many, at most.
        epochs: of training.
        batch: images in a step.
        channels: of the state, a multiple of 4.
        depth: of the twin.
        seed: of everything random.
    """
    torch.manual_seed(seed)
    if folder is None:
        learn, check = draw(train_images), draw(test_images)
    else:
        learn, check = read(folder, "train", train_images), read(folder, "t10k", test_images)
    outcomes = {}
    for name, layers in {"equilibrium": None, f"twin of {depth}": depth}.items():
        torch.manual_seed(seed + 1)
        model = Classifier(channels, layers)
        seconds = train(model, learn, epochs, batch)
        outcomes[name] = Outcome(*test(model, check), seconds, memory(model, learn, batch))
    print("               accuracy  evaluations  ms a step  peak MiB")
    for name, (accuracy, evaluations, seconds, held) in outcomes.items():
        print(f"{name:15}{accuracy:8.2%}{evaluations:13.1f}{1e3 * seconds:11.0f}{held:12.1f}")
    return outcomes


if __name__ == "__main__":
    torch.set_num_threads(1)
    tyro.cli(main, description=__doc__)
