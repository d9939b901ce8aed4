from __future__ import annotations

from collections import Counter

import pytest

from equilibria.train.solve_config import SolveConfig
from equilibria.train.solves import jacobian_schedule, step_budget


def released_weights(weight: float, every: int, pretrain_steps: int, steps: int) -> list[float]:
    """The weight in force at each step, as the loop of the released script raises it after every step."""
    weights = []
    for step in range(1, steps + 1):
        weights.append(weight)
        if step > max(0, pretrain_steps) and step % every == 0:
            weight += 0.1
    return weights


@pytest.mark.parametrize(("every", "pretrain_steps"), [(30, 32), (35, 32), (10, 0), (7, 21), (7, 20)])
def test_jacobian_weight_grows_as_in_the_released_script(every: int, pretrain_steps: int):
    config = SolveConfig(jacobian_weight=1.9, jacobian_share=1.0, jacobian_every=every)
    schedule = jacobian_schedule(config, pretrain_steps, 0)
    mine = [schedule(step) for step in range(200)]
    expected = released_weights(1.9, every, pretrain_steps, 200)
    assert mine[pretrain_steps:] == pytest.approx(expected[pretrain_steps:])  # before, there are no solves
    assert mine[-1] > 1.9


def test_no_jacobian_loss_without_a_weight():
    schedule = jacobian_schedule(SolveConfig(jacobian_share=1.0), 0, 0)
    assert all(schedule(step) == 0 for step in range(50))


def test_budgets_are_uniform_and_depend_on_seed_and_step_alone():
    config = SolveConfig(max_evals=12, max_evals_delta=2)
    drawn = [step_budget(config, 3, step) for step in range(3000)]
    assert drawn == [step_budget(config, 3, step) for step in range(3000)]
    assert drawn != [step_budget(config, 4, step) for step in range(3000)]
    counts = Counter(drawn)
    assert set(counts) == {10, 11, 12}
    assert all(count == pytest.approx(1000, abs=130) for count in counts.values())  # five standard deviations
    assert step_budget(SolveConfig(max_evals=12), 3, 5) == 12
