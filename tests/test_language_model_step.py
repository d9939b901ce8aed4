"""The comparison of steps of language models finds least budgets, refuses wrong gradients, and stores right rows.

None of the peers' code is needed here.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from equilibria.models import Memory

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
try:
    from lm_step.ours import Ours
    from lm_step.shape import Batch, Shape, Solve, error_of, relative
    from lm_step.ways import Way, fewest, solved, trained, ways
finally:
    sys.path.remove(str(BENCHMARKS))

STORED = BENCHMARKS / "results" / "language_model_step.json"
SHAPE = Shape(d_model=16, n_head=2, d_inner=32, vocab=20, batch=3, length=5, memory=4)


@pytest.fixture
def side() -> Ours:
    torch.manual_seed(0)
    return Ours(SHAPE)


@pytest.fixture
def batch() -> Batch:
    torch.manual_seed(1)
    tokens, targets = torch.randint(20, (2, 3, 5))
    return Batch(tokens, targets, Memory(torch.randn(3, 4, 16), torch.randn(3, 4, 48)))


@pytest.fixture
def way(side: Ours, batch: Batch) -> Way:
    return ways("equilibria", side, batch, [("anderson", "gmres")], 6)[0]


@pytest.mark.parametrize("least", [3, 4, 7, 31, 60])
def test_fewest_is_the_least_that_does(least: int) -> None:
    asked: list[int] = []

    def does(n: int) -> bool:
        asked.append(n)
        return n >= least

    assert fewest(does) == least
    assert len(asked) < 12


def test_fewest_says_so_where_none_does() -> None:
    assert fewest(lambda n: False) is None


def test_the_error_of_gradients() -> None:
    exact = {"a": torch.tensor([3.0]), "b": torch.tensor([0.0, 4.0])}
    assert error_of(exact, exact) == 0
    assert error_of({"a": torch.tensor([3.0]), "b": torch.tensor([1.0, 4.0])}, exact) == pytest.approx(1 / 5)
    with pytest.raises(ValueError, match="cannot be compared"):
        error_of({"a": torch.tensor([3.0])}, exact)


def test_a_step_with_a_rate_of_0_leaves_all_as_it_was(way: Way) -> None:
    before = {name: tensor.clone() for name, tensor in way.side.model.state_dict().items()}
    assert way.step() == pytest.approx(way.evaluate(), abs=1e-6)
    for name, tensor in way.side.model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)


def test_the_harness_measures_the_state_that_the_loss_is_computed_from(side: Ours, way: Way, batch: Batch) -> None:
    side.use(way.forward, way.backward)
    found = side.look(batch, training=True)
    assert found.residual == pytest.approx(float(relative(found.map(found.state), found.state).max()))
    assert side.loss_at(found.state, batch).item() == pytest.approx(side.evaluate(batch), abs=1e-6)
    assert way.spending(forward=12).residual(training=True) < found.residual


def test_the_reference_is_the_gradient_of_converged_solves(side: Ours, way: Way, batch: Batch) -> None:
    long = way.spending(forward=60, backward=60)
    side.use(long.forward, long.backward)
    exact = side.differentiate(batch)
    z = side.look(batch, training=True).state
    assert error_of(side.implicit_gradient(batch, z), exact) < 1e-4
    assert error_of(side.implicit_gradient(batch, z + 0.1 * torch.randn_like(z)), exact) > 1e-2


def test_least_budgets_reach_what_was_asked_and_smaller_ones_do_not(side: Ours, way: Way, batch: Batch) -> None:
    found = solved(way, 1e-3, training=False)
    assert found is not None
    assert found.residual(training=False) <= 1e-3
    assert found.spending(forward=found.forward.evaluations - 1).residual(training=False) > 1e-3
    best = trained(way, 1e-3, lambda z: side.implicit_gradient(batch, z), 3e-3)
    assert best is not None
    error = best.error(lambda z: side.implicit_gradient(batch, z))
    assert error(best.backward.evaluations) <= 3e-3
    assert best.backward.evaluations == 3 or error(best.backward.evaluations - 1) > 3e-3
    assert trained(way, 1e-3, lambda z: {n: 2 * g for n, g in side.implicit_gradient(batch, z).items()}, 3e-3) is None


def test_the_twin_has_the_parameters_of_the_model(side: Ours, batch: Batch) -> None:
    twin = Ours(SHAPE, depth=3)
    twin.model.load_state_dict(side.model.state_dict())
    side.use(Solve("picard", 4), Solve("gmres", 1))  # Picard's fourth evaluation measures the third step
    assert twin.evaluate(batch) == pytest.approx(side.evaluate(batch), abs=1e-6)


def stored() -> list[Any]:
    sizes = json.loads(STORED.read_text(encoding="utf-8"))["sizes"]
    return [
        pytest.param(float(key), row, result["search"][key]["allowed_error"], id=f"{size}-{key}")
        for size, result in sizes.items()
        for key, row in result.get("residual", {}).items()
    ]


@pytest.mark.parametrize(("tol", "row", "allowed"), stored())
def test_a_stored_time_is_that_of_a_right_result(tol: float, row: dict[str, Any], allowed: float) -> None:
    for kind in ("training", "evaluation"):
        for way in row[kind]["rows"]:
            assert way["residual"] <= tol, way["name"]
            assert way.get("error", 0.0) <= allowed, way["name"]
        times = {way["name"]: way["ms"] for way in row[kind]["rows"]}
        assert all(times[name] is not None for name in row[kind]["best"].values())
        assert set(row[kind]["ratios"]) == set(row[kind]["best"]) - {"equilibria"}


def test_ours_and_the_original_compute_the_same() -> None:
    for result in json.loads(STORED.read_text(encoding="utf-8"))["sizes"].values():
        assert result["agreement"]["f"] < 1e-5
        assert result["agreement"]["loss"] < 1e-5
