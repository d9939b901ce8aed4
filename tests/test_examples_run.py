"""The programs in examples/ at a small size, and what they claim."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module


def test_layer_has_the_gradient_of_the_unrolled_network_and_of_finite_differences(example: Callable[[str], Any]) -> None:
    result = example("layer").main(width=8, batch=4)
    assert result.worst < 1e-3  # of the default tolerance of the backward solve, 1e-4
    assert result.unrolled == pytest.approx(result.finite_difference, rel=1e-6)


def test_prepare_changes_the_time_and_nothing_else(example: Callable[[str], Any]) -> None:
    result = example("own_f").main(rounds=3)
    assert result.speedup > 1.2
    assert result.difference < 1e-5
    assert not any(result.unconverged.values())
    errors = result.gradient_errors
    assert errors["Implicit"] < 1e-3 < errors["Phantom, 5 steps"] < errors["Phantom, 1 step"]


def test_training_on_forces_follows_the_right_second_derivative(example: Callable[[str], Any]) -> None:
    result = example("second_order").main(width=12, atoms=4, steps=60, batch=8)
    assert result.gradient_error < 1e-5
    assert result.shortcut_error > 1e-3  # or the example would show nothing
    assert result.after < 0.8 * result.before


def test_an_equilibrium_tells_digits_apart_as_its_twin_does_in_less_memory(example: Callable[[str], Any]) -> None:
    outcomes = example("mnist").main(train_images=1500, test_images=500, epochs=1, batch=50, channels=16, depth=40)
    equilibrium, twin = outcomes.values()
    assert equilibrium.accuracy > 0.6  # chance is 0.1
    assert twin.accuracy > 0.6
    assert equilibrium.evaluations <= 20
    assert equilibrium.peak_mib < twin.peak_mib


def test_real_digits(example: Callable[[str], Any], shared_data: Path) -> None:
    outcomes = example("mnist").main(shared_data / "mnist", train_images=1500, test_images=500, epochs=1, batch=50, depth=2)
    assert outcomes["equilibrium"].accuracy > 0.7


def test_larger_mazes_are_solved_by_iterating_longer(example: Callable[[str], Any]) -> None:
    rows = example("looped_reasoning").main(steps=500, largest=5, test_sizes=(5, 8), budgets=(4, 16, 128), count=50)
    for row in rows.values():
        assert row.solved == sorted(row.solved)
    assert rows[8].solved[0] < 0.3
    assert rows[8].solved[-1] > 0.8
    assert rows[8].from_noise > 0.8
    assert rows[5].evaluations < rows[8].evaluations


def test_a_learned_step_may_be_iterated_as_long_as_one_likes(example: Callable[[str], Any]) -> None:
    result = example("inverse_problem").main(steps=100, channels=8, length=48, batch=8)
    *_, after_50, after_100 = result.at_the_equilibrium
    assert after_100 == pytest.approx(after_50, abs=0.1)
    assert after_100 > result.seen + 1
