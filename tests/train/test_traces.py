"""The solves that a run keeps to look at."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from small_runs import CONFIG, Make, losses, weights, with_optim

from equilibria.data import Corpus
from equilibria.recipes.build import build_model
from equilibria.stopping import Stopping
from equilibria.train.loop import Trainer
from equilibria.train.run_folder import read_metrics
from equilibria.train.traces import relative_trace, trace_row, trace_solve


def test_a_trace_falls_and_ends_where_the_solve_did(corpus: Corpus):
    torch.manual_seed(0)
    config = dataclasses.replace(CONFIG, solver=dataclasses.replace(CONFIG.solver, history=20))
    model = build_model(config, corpus.tokenizer.size)
    stopping = Stopping(rtol=1e-4, atol=0.0, max_evals=100)
    stats = trace_solve(model, corpus.valid, stopping, batch_size=2, length=5, device=torch.device("cpu"))
    row = trace_row(stats)
    assert len(row["median"]) == len(relative_trace(stats)) > 3
    assert row["samples"] == 2
    assert row["worst"][-1] <= 1e-4 < row["worst"][-2]
    assert row["median"][0] > 0.1
    assert torch.allclose(relative_trace(stats)[-1], stats.relative.double(), rtol=1e-4)


def test_a_trace_changes_nothing(corpus: Corpus):
    model = build_model(CONFIG, corpus.tokenizer.size)
    model.train()
    random, stopping = torch.get_rng_state(), model.deq.eval_stopping
    trace_solve(model, corpus.valid, Stopping(), batch_size=2, length=5, device=torch.device("cpu"))
    assert torch.equal(random, torch.get_rng_state())
    assert model.training
    assert model.deq.eval_stopping is stopping
    assert model.deq.raise_nonfinite


def test_a_solve_that_becomes_nan_is_a_row_as_any_other(corpus: Corpus):
    model = build_model(CONFIG, corpus.tokenizer.size)
    with torch.no_grad():
        for parameter in model.block.parameters():
            parameter.fill_(float("nan"))
    row = trace_row(trace_solve(model, corpus.valid, Stopping(), batch_size=2, length=5, device=torch.device("cpu")))
    json.dumps(row, allow_nan=False)


def test_a_run_keeps_one_at_each_validation_and_trains_as_without(make: Make, monkeypatch: pytest.MonkeyPatch):
    traced = make(with_optim(steps=9))
    traced.run()
    rows = read_metrics(traced.folder.traces)
    assert [row["step"] for row in rows] == [4, 8, 9]
    monkeypatch.setattr(Trainer, "_trace", lambda self: None)
    monkeypatch.setattr("equilibria.train.recorder.Recorder.record_trace", lambda self, stats: None)
    plain = make(with_optim(steps=9), name="plain")
    plain.run()
    assert losses(traced) == losses(plain)
    assert all(torch.equal(tensor, weights(plain)[name]) for name, tensor in weights(traced).items())


def test_a_resumed_run_repeats_its_traces_and_a_stack_has_none(make: Make):
    make(with_optim(steps=4)).run()
    make(with_optim(steps=9)).run()
    assert [row["step"] for row in read_metrics(make(with_optim(steps=9)).folder.traces)] == [4, 8, 9]
    stack = make(dataclasses.replace(with_optim(steps=4), model=dataclasses.replace(CONFIG.model, depth=2)), name="stack")
    stack.run()
    assert read_metrics(stack.folder.traces) == []
