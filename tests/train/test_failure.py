"""Losses, gradients and solves that are not finite: what is kept of them, and going back to a checkpoint."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from small_runs import CONFIG, Make, losses, weights, with_optim
from torch import Tensor

from equilibria.recipes.build import build_model
from equilibria.solution import NonFiniteError
from equilibria.train.checkpoint import load_weights
from equilibria.train.config import RunConfig
from equilibria.train.failure import Failure, load_failure
from equilibria.train.interrupt import Interrupted, StopRequest
from equilibria.train.loop import Trainer
from equilibria.train.run_folder import read_metrics

ROLL_BACK = dataclasses.replace(CONFIG, on_nonfinite="roll-back")


def poison(trainer: Trainer, segment: int, epoch: int = 0, value: float = math.nan) -> list[int]:
    """Let the loss of one batch of the training text not be finite; the list grows with each time it is met."""
    bad, _ = trainer.reader._all.at_epoch(epoch)[segment]
    forward, met = trainer.model.forward, []

    def poisoned(tokens: Tensor, *args: Any, **options: Any) -> Any:
        output = forward(tokens, *args, **options)
        if trainer.model.training and torch.equal(tokens, bad):
            met.append(trainer.state.step)
            output = output._replace(nll=output.nll * value)
        return output

    trainer.model.forward = poisoned
    return met


def repeat(failure: Failure) -> float:
    """The loss of a failed step of one segment, anew."""
    model = build_model(failure.config, failure.vocab_size)
    load_weights(failure.folder, model)
    failure.set_random_state()
    ((tokens, targets),) = failure.batches
    return model(tokens, targets, failure.memory(model), depth=failure.depth).nll.mean().item()


def test_a_failed_step_can_be_repeated(make: Make):
    trainer = make(with_optim(lr=1e12, warmup_steps=0, pretrain_steps=0, clip=1e9))
    with pytest.raises(NonFiniteError) as caught:
        trainer.run()
    (folder,) = trainer.folder.failures.iterdir()
    assert str(folder) in str(caught.value)
    failure = load_failure(folder)
    assert (failure.step, failure.in_validation, failure.config) == (trainer.state.step + 1, False, trainer.config)
    assert failure.learning_rate == trainer.rate.rate
    assert failure.metrics == read_metrics(trainer.folder.metrics)
    assert [row["step"] for row in failure.metrics] == list(range(1, failure.step))
    model = build_model(failure.config, failure.vocab_size)
    load_weights(folder, model)
    before = trainer.model.state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert failure.reason.startswith("the solve became inf or NaN")
    with pytest.raises(NonFiniteError) as again:
        repeat(failure)
    assert again.value.solution is not None
    assert torch.equal(failure.solves[-1].status, again.value.solution.stats.status)


def test_memory_random_state_and_solves_are_those_of_the_step(make: Make):
    """Where the loss is poisoned from outside, the repeated step has the very loss that it would have had."""
    plain = make(name="plain")
    plain.run()
    trainer = make()
    poison(trainer, segment=5)
    with pytest.raises(
        NonFiniteError, match=r"step 6: the loss became infinite or NaN; the last checkpoint is that of step 4"
    ):
        trainer.run()
    failure = load_failure(trainer.folder.failure(6))
    assert failure.checkpoint == 4
    assert failure.memory(trainer.model) is not None
    expected = next(row for row in read_metrics(plain.folder.metrics) if row["step"] == 6)
    assert repeat(failure) == expected["train/loss"]
    (solve,) = failure.solves
    assert solve.evaluations == expected["forward/evaluations"]
    assert float(solve.relative.mean()) == pytest.approx(expected["forward/residual"])
    assert [row["step"] for row in failure.metrics] == [5]
    assert failure.nonfinite_gradients == []


def test_going_back_restores_everything_and_passes_the_batch_over(make: Make, capsys: pytest.CaptureFixture[str]):
    trainer = make(ROLL_BACK)
    met = poison(trainer, segment=6)
    trainer.run()
    assert met == [6], "the batch is met once"
    assert (trainer.state.step, trainer.state.rollbacks) == (14, 1)
    assert "step 7: the loss became infinite or NaN; back to the checkpoint of step 4 (roll-back 1 of 3)" in (
        capsys.readouterr().err
    )
    rows = [row["step"] for row in read_metrics(trainer.folder.metrics) if "train/loss" in row]
    assert rows == list(range(1, 15)), "the steps that were left are not in the metrics"
    assert load_failure(trainer.folder.failure(7)).checkpoint == 4

    # The same by hand: stop at the checkpoint, and go on behind the batch.
    by_hand = make(name="by hand", last_step=4)
    by_hand.run()
    by_hand = make(name="by hand")
    by_hand.state.segment, by_hand.reader.memory = 7, None
    by_hand.run()
    mine, other = weights(trainer), weights(by_hand)
    assert all(torch.equal(mine[name], other[name]) for name in other)
    assert losses(trainer) == losses(by_hand)
    assert (trainer.state.best_nll, trainer.state.tokens) == (by_hand.state.best_nll, by_hand.state.tokens)


class StopAtStep(StopRequest):
    def __init__(self, step: int, trainer: Callable[[], Trainer]) -> None:
        super().__init__()
        self.step, self.trainer = step, trainer

    def check(self) -> None:
        self.requested = self.trainer().state.step == self.step and self.trainer().state.rollbacks == 1
        super().check()


@pytest.mark.parametrize("killed", [False, True])
def test_a_run_that_went_back_resumes_exactly(make: Make, killed: bool):
    whole = make(ROLL_BACK, name="whole")
    poison(whole, segment=6)
    whole.run()

    class Killed(BaseException):
        pass

    first: Trainer
    first = make(ROLL_BACK, stop=StopAtStep(6, lambda: first))
    poison(first, segment=6)
    if killed:  # before there is a checkpoint that remembers the roll-back
        first.save = lambda: (_ for _ in ()).throw(Killed) if first.state.rollbacks else Trainer.save(first)  # type: ignore
    with pytest.raises(Killed if killed else Interrupted):
        first.run()
    resumed = make(ROLL_BACK)
    assert (resumed.state.step, resumed.state.rollbacks) == ((4, 0) if killed else (6, 1))
    met = poison(resumed, segment=6)
    resumed.run()
    assert len(met) == killed
    assert losses(resumed) == losses(whole)
    mine, other = weights(resumed), weights(whole)
    assert all(torch.equal(mine[name], other[name]) for name in other)


def test_it_stops_after_so_many_roll_backs(make: Make):
    trainer = make(dataclasses.replace(ROLL_BACK, max_rollbacks=2))
    met = [poison(trainer, segment) for segment in (1, 2, 3, 4)]
    with pytest.raises(NonFiniteError, match=r"step 1: the loss became infinite or NaN after 2 roll-backs; .* step 0"):
        trainer.run()
    assert met == [[1], [0], [0], []], "it went back to the start, which was saved for that"
    names = sorted(folder.name for folder in trainer.folder.failures.iterdir())
    assert names == ["step-00000001-2", "step-00000001-3", "step-00000002"]
    resumed = make(dataclasses.replace(ROLL_BACK, max_rollbacks=4))
    resumed.run()
    assert resumed.state.step == 14


GRADIENTS = {
    "one segment": CONFIG,
    "accumulated": with_optim(accumulate=2),
    "in parts": with_optim(batch_chunk=2),
    "hardly clipped": with_optim(clip=1e30),
    "bf16": dataclasses.replace(CONFIG, precision="bf16"),
}


@pytest.mark.parametrize(("case", "value"), [*((case, math.inf) for case in GRADIENTS), ("accumulated", math.nan)])
def test_a_gradient_that_is_not_finite_never_reaches_the_weights(
    make: Make, case: str, value: float, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(AcceleratorState, "_shared_state", {})  # which else keeps the precision of the process's first run
    config: RunConfig = GRADIENTS[case]
    trainer = make(config)
    name, parameter = next((name, each) for name, each in trainer.model.named_parameters() if each.ndim == 2)
    calls = 0

    def spoil(gradient: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        gradient = gradient.clone()
        if calls == 3:
            gradient[0, 0] = value
        return gradient

    parameter.register_hook(spoil)
    with pytest.raises(NonFiniteError, match="the gradient became infinite or NaN"):
        trainer.run()
    assert all(tensor.isfinite().all() for tensor in trainer.model.state_dict().values())
    (folder,) = trainer.folder.failures.iterdir()
    failure = load_failure(folder)
    assert name in failure.nonfinite_gradients
    assert len(failure.batches) == config.optim.accumulate
    assert all(solve.backward for solve in failure.solves)


def test_a_validation_that_is_not_finite(make: Make):
    config = dataclasses.replace(ROLL_BACK, max_rollbacks=1)
    trainer = make(config)
    evaluate, calls = trainer.evaluate, 0

    def poisoned(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        result = evaluate(*args, **options)
        return dataclasses.replace(result, nll=math.nan) if calls == 2 else result

    trainer.evaluate = poisoned  # type: ignore[method-assign]
    trainer.run()
    failure = load_failure(trainer.folder.failure(8))
    assert failure.in_validation
    assert (failure.step, failure.batches, failure.reason) == (8, [], "the validation loss became infinite or NaN")
    assert (trainer.state.step, trainer.state.rollbacks, trainer.state.epoch) == (14, 1, 1)
    assert all(math.isfinite(row["valid/loss"]) for row in read_metrics(trainer.folder.metrics) if "valid/loss" in row)


def test_weights_that_are_not_finite_are_never_saved(make: Make):
    trainer = make(last_step=4)
    trainer.run()
    with torch.no_grad():
        next(trainer.model.parameters()).view(-1)[0] = math.inf
    trainer.state.step = 5
    with pytest.raises(NonFiniteError, match="the weights became infinite or NaN"):
        trainer.save()
    assert trainer.folder.checkpoints.steps() == [4]
