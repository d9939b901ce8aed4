"""Means of a window, of one process and of several."""

from __future__ import annotations

import pytest
import torch

from equilibria.solution import Stats, Status
from equilibria.train.window import Window


def solve(residuals: list[float], evaluations: int, *, tolerance: float = 0.1, backward: Stats | None = None) -> Stats:
    relative = torch.tensor(residuals)
    status = torch.where(relative <= tolerance, int(Status.CONVERGED), int(Status.EXHAUSTED)).to(torch.int8)
    steps = torch.full_like(status, evaluations, dtype=torch.int64)
    return Stats(
        residual=relative, relative=relative, evaluations=evaluations, steps=steps, status=status,
        backward=[backward] if backward else [],
    )  # fmt: skip


def filled(shift: float = 0.0) -> Window:
    window = Window()
    window.add(2.0 + shift, 10, [solve([0.05, 0.2], 6, backward=solve([0.5, 0.01], 3))])
    window.add(4.0 + shift, 10, [solve([0.05, 0.1], 4)])
    window.step(gradient_norm=3.0 + shift, clip=1.0, seconds=0.5)
    window.step(gradient_norm=1.0, clip=1.0, seconds=0.5)
    return window


def test_a_row_holds_the_means():
    expected = {
        "train/loss": 3.0, "train/gradient_norm": 2.0, "train/clipped": 0.5, "train/tokens_per_second": 20.0,
        "forward/evaluations": 5.0, "forward/residual": 0.1, "forward/unconverged": 0.25,
        "backward/evaluations": 3.0, "backward/residual": 0.255, "backward/unconverged": 0.5,
    }  # fmt: skip
    assert filled().row() == pytest.approx(expected)


def test_the_sums_of_two_processes_make_the_row_of_the_whole_job():
    alone, other = filled(), filled(1.0)
    row = alone.row(alone.sums() + other.sums())
    assert row["train/loss"] == pytest.approx(3.5)
    assert row["train/gradient_norm"] == pytest.approx(2.25)
    assert row["train/tokens_per_second"] == pytest.approx(40.0)
    assert row["forward/residual"] == pytest.approx(0.1)
    assert row["backward/unconverged"] == pytest.approx(0.5)


def test_a_stack_has_no_solves_and_a_cleared_window_nothing():
    window = filled()
    window.clear()
    assert not window.sums().any()
    window.add(1.0, 10, [])
    window.step(gradient_norm=0.5, clip=1.0, seconds=1.0)
    assert set(window.row()) == {"train/loss", "train/gradient_norm", "train/clipped", "train/tokens_per_second"}
    assert window.status() == "loss 1.000  10 tokens/s"
