from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import CONFIG, Make, losses, weights, with_optim
from torch import nn

from equilibria.data import copy_memory
from equilibria.recipes.build import build_model
from equilibria.train.config import DataConfig, RunConfig, SolveConfig, TransformerModel, TrellisModel
from equilibria.train.evaluate import Evaluation
from equilibria.train.interrupt import Interrupted, StopRequest
from equilibria.train.loop import Trainer
from equilibria.train.run_folder import RunFolder, read_metrics
from equilibria.train.solves import step_budget

MODELS = {
    "transformer": TransformerModel(d_model=32, n_head=2, d_inner=16, mem_len=6, init_std=0.05, inject_std=1.0),
    "trellisnet": TrellisModel(d_embed=4, d_hidden=6, d_output=4, init_std=0.1, inject_std=0.3),
}


@pytest.mark.parametrize("family", ["transformer", "trellisnet"])
@pytest.mark.parametrize("depth", [None, 3])
def test_chunks_of_a_batch_take_the_steps_of_the_whole(make: Make, family: str, depth: int | None):
    """Seven lanes in three parts of 3, 3 and 1, each with a memory of its own. Solves are tight, so that they agree."""
    model = MODELS[family]
    solver = SolveConfig(history=10, rtol=1e-6, atol=0.0, max_evals=80, backward_rtol=1e-6, backward_max_evals=60)
    found = []
    for chunks in (1, 3):
        config = dataclasses.replace(
            with_optim(optimizer="sgd", lr=0.5, batch_size=7, batch_chunk=chunks, pretrain_steps=0, steps=6),
            model=dataclasses.replace(model, depth=depth),
            solver=solver,
            log_every=1,
        )
        trainer = make(config, name=f"chunks-{chunks}")
        trainer.run()
        found.append([row["train/loss"] for row in read_metrics(trainer.folder.metrics) if "train/loss" in row])
    assert len(found[0]) == 6
    assert found[1] == pytest.approx(found[0], rel=2e-5)
    assert found[0][-1] < found[0][0]


RESUMED: dict[str, RunConfig] = {
    "trellisnet": dataclasses.replace(with_optim(batch_chunk=2), model=MODELS["trellisnet"]),
    "dev-performance": with_optim(schedule="dev-performance", optimizer="sgd", momentum=0.9, lr=1.0, decay_rate=0.7),
    "step-decay": with_optim(schedule="step-decay", decay_epochs=(1,), anneal=1, optimizer="radam", decay_rate=0.1),
    "inverse-sqrt": with_optim(schedule="inverse-sqrt", optimizer="rmsprop", lr_as_released=True),
    "variable lengths": with_optim(variable_length=True, optimizer="adagrad"),
    "random budget": dataclasses.replace(
        CONFIG, solver=SolveConfig(max_evals=6, max_evals_delta=3, backward_max_evals=4, rtol=1e-9), eval_every=None
    ),
}


@pytest.mark.parametrize("case", RESUMED)
def test_every_option_resumes_exactly(make: Make, case: str):
    config = RESUMED[case]
    uninterrupted = make(config, name="whole")
    uninterrupted.run()
    with pytest.raises(Interrupted):
        make(config, stop=StopAtStep(6)).run()
    torch.rand(3)
    with pytest.raises(Interrupted):
        make(config, stop=StopAtStep(6)).run()
    resumed = make(config)
    assert resumed.state.step in (6, 12)
    resumed.run()
    assert losses(resumed) == losses(uninterrupted)
    mine, wholes = weights(resumed), weights(uninterrupted)
    assert all(torch.equal(mine[name], wholes[name]) for name in wholes)


def test_checkpoints_between_validations(make: Make, monkeypatch: pytest.MonkeyPatch):
    """A killed run goes on from the latest, to the numbers that it would have reached; step 8 is saved once, validated."""
    config = dataclasses.replace(CONFIG, eval_every=8, checkpoint_every=4, log_every=3)
    whole = make(config, name="whole")
    saved, save = [], whole.save
    monkeypatch.setattr(whole, "save", lambda: saved.append(whole.state.step) or save())
    whole.run()
    assert saved == [4, 8, 12, 14]

    killed = make(config)
    step = killed._step
    monkeypatch.setattr(
        killed, "_step", lambda: step() if killed.state.step < 6 else (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        killed.run()
    resumed = make(config)
    assert resumed.state.step == 4
    resumed.run()
    assert losses(resumed) == losses(whole)
    mine, wholes = weights(resumed), weights(whole)
    assert all(torch.equal(mine[name], wholes[name]) for name in wholes)


class StopAtStep(StopRequest):
    """Asks to stop before the n-th of its steps; a validation is never cut short."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.left = steps

    def check(self) -> None:
        if sys._getframe(2).f_code.co_name == "_loop":
            self.left -= 1
            self.requested = self.left < 0
            super().check()


def test_rate_of_dev_performance_follows_the_validations(make: Make):
    config = with_optim(schedule="dev-performance", warmup_steps=0, lr=1e-2, decay_rate=0.5, eta_min=1e-3)
    trainer = make(config)
    losses = iter([3.0, 2.0, 2.5, 2.5])
    trainer.evaluate = lambda split, depth=None: Evaluation(  # type: ignore[method-assign]
        nll=next(losses), perplexity=1.0, bits_per_byte=1.0, tokens=1, seconds=1.0
    )
    trainer.run()
    rows = read_metrics(trainer.folder.metrics)
    rates = {row["step"]: row["train/learning_rate"] for row in rows if "train/loss" in row}
    assert rates[8] == 1e-2
    assert rates[13] == 5e-3
    assert trainer.rate.rate == 2.5e-3


def test_budget_is_drawn_step_by_step(make: Make):
    config = dataclasses.replace(
        with_optim(pretrain_steps=0), solver=SolveConfig(max_evals=7, max_evals_delta=3, rtol=1e-12, backward_max_evals=4)
    )
    trainer = make(config)
    trainer.run()
    rows = [row for row in read_metrics(trainer.folder.metrics) if "forward/evaluations" in row]
    drawn = [step_budget(config.solver, config.seed, step) for step in range(14)]
    assert [row["forward/evaluations"] for row in rows] == drawn
    assert set(drawn) == {4, 5, 6, 7}
    assert all(row["valid/evaluations"] == 7 for row in read_metrics(trainer.folder.metrics) if "valid/loss" in row)


def test_independent_sequences_are_read_without_memory_in_another_order_each_epoch(tmp_path: Path):
    corpus = copy_memory(4, train=10, valid=5, test=5)
    config = dataclasses.replace(
        with_optim(batch_size=4, length=24, steps=7, pretrain_steps=0), data=DataConfig(corpus="copy-memory", delay=4)
    )
    torch.manual_seed(0)
    folder = RunFolder(tmp_path)
    trainer = Trainer(build_model(config, corpus.tokenizer.size), corpus, config, folder, stop=StopRequest())
    seen: list[torch.Tensor] = []

    def look(_: nn.Module, args: tuple[Any, ...]) -> None:
        if torch.is_grad_enabled():
            assert args[2] is None
            seen.append(args[0])

    trainer.model.register_forward_pre_hook(look)
    trainer.run()
    first, second = torch.cat(seen[:3]), torch.cat(seen[3:6])
    assert [len(each) for each in seen] == [4, 4, 2, 4, 4, 2, 4]
    assert not torch.equal(first, second)
    assert sorted(first.tolist()) == sorted(second.tolist())
    row = next(row for row in read_metrics(trainer.folder.metrics) if "valid/loss" in row)
    assert "valid/bits_per_byte" not in row


def test_validation_of_the_warm_up_stack_has_its_own_depth(make: Make):
    seen: list[int | None] = []
    trainer = make(with_optim(pretrain_steps=5, eval_depth=3, steps=8))
    plain = trainer.evaluate
    trainer.evaluate = lambda split, depth=None: seen.append(depth) or plain(split, depth=depth)  # type: ignore[method-assign]
    trainer.run()
    assert seen == [3, None]


def test_validation_once_per_epoch_of_so_many_segments(make: Make):
    config = dataclasses.replace(with_optim(steps=25), eval_every=None, eval_length=7, max_eval_steps=2)
    trainer = make(config)
    trainer.run()
    per_epoch = len(trainer.reader.batches)
    rows = [row for row in read_metrics(trainer.folder.metrics) if "valid/loss" in row]
    assert [row["step"] for row in rows] == [per_epoch, 2 * per_epoch, 25]
    assert trainer.evaluate("valid").tokens == 2 * 7 * config.eval_batch_size


@pytest.mark.parametrize("accumulate", [2, 3, 25])
def test_validation_after_the_step_in_which_an_epoch_ends(make: Make, accumulate: int):
    """Eleven segments: steps of two, three and twenty-five go on into the next epoch, and past whole ones."""
    trainer = make(dataclasses.replace(with_optim(accumulate=accumulate, steps=13), eval_every=None))
    per_epoch = len(trainer.reader.batches)
    assert per_epoch == 11
    trainer.run()
    steps = [row["step"] for row in read_metrics(trainer.folder.metrics) if "valid/loss" in row]
    ends = {step for step in range(1, 14) if step * accumulate // per_epoch > (step - 1) * accumulate // per_epoch}
    assert steps == sorted(ends | {13})
