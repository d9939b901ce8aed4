from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from small_runs import CONFIG, Make, losses, weights, with_optim
from torch import nn

from equilibria.data import Corpus, Split
from equilibria.recipes.build import build_model
from equilibria.solution import NonFiniteError, UserError
from equilibria.train.checkpoint import load_state, save_checkpoint
from equilibria.train.interrupt import Interrupted, StopRequest
from equilibria.train.loop import Trainer
from equilibria.train.optimizer import make_optimizer
from equilibria.train.run_folder import RunFolder, read_metrics
from equilibria.train.schedule import learning_rate


class StopAfter(StopRequest):
    """Asks to stop at the n-th check: the loop checks before every step, a validation after every segment."""

    def __init__(self, checks: int) -> None:
        super().__init__()
        self.left = checks

    def check(self) -> None:
        self.left -= 1
        self.requested = self.left < 0
        super().check()


def test_loss_falls_and_rows_are_complete(make: Make):
    trainer = make(with_optim(steps=40))
    trainer.run()
    train = [row for row in read_metrics(trainer.folder.metrics) if "train/loss" in row]
    assert [row["step"] for row in train] == list(range(1, 41))
    assert train[0]["train/loss"] == pytest.approx(math.log(256), rel=0.05)
    assert sum(row["train/loss"] for row in train[-5:]) / 5 < 0.6 * train[0]["train/loss"]
    assert train[2]["train/learning_rate"] == learning_rate(3, trainer.config.optim)
    assert train[9]["train/tokens"] == 10 * 3 * 5
    assert trainer.state.peak_memory > 2**20


# One check comes before each of the 14 steps, and 8 in each validation, after steps 4, 8, 12 and 14.
MOMENTS = {
    "before the first step": (0, 0),
    "in the warm-up": (2, 2),
    "after the warm-up": (3, 3),
    "in the first validation": (4, 4),
    "at the end of a validation": (11, 4),
    "after a validation": (12, 4),
    "before the end of the epoch": (26, 10),
    "between two epochs": (27, 11),
    "after the start of an epoch": (36, 12),
    "in the last validation": (40, 14),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_resumed_run_takes_the_very_same_steps(make: Make, moment: str, whole: Trainer):
    checks, step = MOMENTS[moment]
    with pytest.raises(Interrupted):
        make(stop=StopAfter(checks)).run()
    torch.rand(3)  # whatever happens in between
    resumed = make()
    assert resumed.state.step == step
    resumed.run()
    assert losses(resumed) == losses(whole)
    mine, wholes = weights(resumed), weights(whole)
    assert all(torch.equal(mine[name], wholes[name]) for name in wholes)
    assert resumed.state.epoch == whole.state.epoch == 1
    assert resumed.state.best_nll == whole.state.best_nll
    assert resumed.state.best_step == whole.state.best_step


@pytest.fixture(scope="module")
def whole(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """The same run, not interrupted."""
    torch.manual_seed(CONFIG.seed)
    model = build_model(CONFIG, corpus.tokenizer.size)
    folder = RunFolder(tmp_path_factory.mktemp("whole"))
    trainer = Trainer(model, corpus, CONFIG, folder, stop=StopRequest())
    trainer.run()
    return trainer


def test_killed_run_repeats_the_steps_after_its_checkpoint(make: Make, whole: Trainer):
    class Killed(BaseException):
        pass

    trainer = make()
    step = trainer._step

    def killed_at_7() -> None:
        if trainer.state.step == 7:
            raise Killed
        step()

    trainer._step = killed_at_7  # type: ignore[method-assign]
    with pytest.raises(Killed):
        trainer.run()
    assert max(losses(trainer)) == 7
    resumed = make()
    assert resumed.state.step == 4
    resumed.run()
    assert losses(resumed) == losses(whole)


def test_jacobian_loss_is_added_at_the_same_steps_when_resumed(make: Make):
    config = dataclasses.replace(
        with_optim(steps=8, pretrain_steps=0),
        solver=dataclasses.replace(CONFIG.solver, jacobian_weight=1.0, jacobian_share=0.5),
        eval_every=100,
    )
    uninterrupted, plain = make(config, name="whole"), make(dataclasses.replace(config, solver=CONFIG.solver), name="plain")
    uninterrupted.run()
    plain.run()
    with pytest.raises(Interrupted):
        make(config, stop=StopAfter(4)).run()
    torch.rand(3)
    resumed = make(config)
    assert resumed.state.step == 4
    resumed.run()
    assert losses(resumed) == losses(uninterrupted) != losses(plain)
    make(config.for_twin(), name="twin").run()  # the twin has no such loss, and trains all the same


def test_finished_run_stays_as_it_is_and_can_be_prolonged(make: Make):
    make(with_optim(steps=4)).run()
    again = make(with_optim(steps=4))
    before = (again.folder.metrics.read_text(), weights(again))
    again.run()
    assert again.folder.metrics.read_text() == before[0]
    longer = make(with_optim(steps=6))
    longer.run()
    assert longer.state.step == 6


def test_memory_is_carried_within_an_epoch_and_empty_at_its_start(make: Make):
    trainer = make()
    seen: list[bool] = []
    trainer.model.register_forward_pre_hook(lambda _, args: seen.append(args[2] is None) if len(args) > 2 else None)
    for _ in range(len(trainer.reader.batches) + 2):
        trainer._step()
    first_of_epoch = [True] + [False] * (len(trainer.reader.batches) - 1)
    assert seen == [*first_of_epoch, True, False]


def test_accumulated_step_is_the_step_on_the_mean_loss(make: Make, corpus: Corpus):
    config = dataclasses.replace(
        with_optim(accumulate=2, pretrain_steps=0, clip=1e9),
        model=dataclasses.replace(CONFIG.model, depth=2, dropout=0.0),
    )
    trainer = make(config)
    torch.manual_seed(config.seed)
    reference = build_model(config, corpus.tokenizer.size)
    optimizer = make_optimizer(reference, config.optim)
    first = reference(*trainer.reader.batches[0])
    second = reference(*trainer.reader.batches[1], first.memory)
    (0.5 * first.nll.mean() + 0.5 * second.nll.mean()).backward()
    optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = learning_rate(0, config.optim)
    optimizer.step()
    trainer._step()
    assert (trainer.state.step, trainer.state.segment) == (1, 2)
    for name, expected in reference.state_dict().items():
        torch.testing.assert_close(trainer.model.state_dict()[name], expected, msg=name)


def test_gradient_is_clipped(make: Make):
    trainer = make(with_optim(clip=1e-3))
    norms: list[float] = []
    trainer.optimizer.register_step_pre_hook(
        lambda *_: norms.append(
            float(nn.utils.get_total_norm(p.grad for p in trainer.model.parameters() if p.grad is not None))
        )
    )
    trainer._step()
    assert norms == [pytest.approx(1e-3, rel=1e-3)]


def test_minutes_end_a_run_cleanly(make: Make):
    trainer = make(with_optim(minutes=1e-6))
    trainer.run()
    assert trainer.state.step == 1  # at least one step, then a validation and a checkpoint
    assert trainer.state.validated == 1
    assert (trainer.folder.best / "model.safetensors").is_file()


def test_last_step_leaves_the_schedule_alone(make: Make):
    short, full = make(last_step=3, name="short"), make(name="full")
    short.run()
    full.run()
    rates = {trainer: [r["train/learning_rate"] for r in read_metrics(trainer.folder.metrics) if "train/loss" in r][:3]
             for trainer in (short, full)}  # fmt: skip
    assert short.state.step == 3
    assert rates[short] == rates[full]


def test_best_weights_are_those_of_the_lowest_validation_loss(make: Make, whole: Trainer):
    valid = {row["step"]: row["valid/loss"] for row in read_metrics(whole.folder.metrics) if "valid/loss" in row}
    assert sorted(valid) == [4, 8, 12, 14]
    best = min(valid, key=lambda step: valid[step])
    assert json.loads((whole.folder.best / "state.json").read_text())["step"] == best == whole.state.best_step
    assert whole.state.best_nll == valid[best]


def test_stack_of_the_warm_up_is_never_the_best(make: Make):
    trainer = make(with_optim(pretrain_steps=5, steps=6))
    trainer.run()
    assert "valid/evaluations" not in next(row for row in read_metrics(trainer.folder.metrics) if "valid/loss" in row)
    assert trainer.state.best_step == 6


@pytest.mark.parametrize("saved", [False, True])
def test_not_a_number_says_where_and_what_to_do(make: Make, saved: bool):
    trainer = make()
    step = trainer._step

    def poisoned() -> None:
        if trainer.state.step == (6 if saved else 1):
            with torch.no_grad():
                trainer.model.softmax.biases[0].fill_(math.nan)
        step()

    trainer._step = poisoned  # type: ignore[method-assign]
    with pytest.raises(NonFiniteError, match="smaller --lr") as caught:
        trainer.run()
    message = str(caught.value)
    assert message.startswith(f"step {7 if saved else 2}: ")
    assert ("the last checkpoint is that of step 4 in " in message) is saved
    assert ("nothing was saved yet" in message) is not saved
    if saved:
        assert all(tensor.isfinite().all() for tensor in weights(trainer).values())


@pytest.mark.parametrize("split", ["train", "valid"])
def test_another_text_cannot_be_resumed(make: Make, corpus: Corpus, split: str):
    make(with_optim(steps=2)).run()
    text = getattr(corpus, split)
    other = dataclasses.replace(corpus, **{split: Split(text.tokens.flip(0), text.text_bytes)})
    with pytest.raises(UserError, match="the text is not the one"):
        make(with_optim(steps=2), corpus=other)


def test_checkpoint_of_another_version(make: Make):
    trainer = make(with_optim(steps=2))
    trainer.run()
    folder = trainer.folder.checkpoints.path(2)
    state = load_state(folder)
    del state["epoch"]
    save_checkpoint(folder, state)
    with pytest.raises(UserError, match="written by another version: it lacks 'epoch'"):
        make(with_optim(steps=2))
