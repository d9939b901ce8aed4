from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from equilibria.adjoints import Implicit, Neumann, Phantom, Reversible, Shine, Unrolled
from equilibria.recipes import RECIPES
from equilibria.recipes.build import (
    build_adjoint,
    build_corpus,
    build_model,
    build_solver,
    eval_stopping,
    trace_stopping,
)
from equilibria.solution import UserError
from equilibria.solvers import Anderson, Broyden, Picard, ReversiblePicard
from equilibria.train.config import BackwardName, DataConfig, MethodName, RunConfig, SolveConfig, TransformerModel

TINY = RunConfig(recipe="text", model=TransformerModel(d_model=8, n_head=2, d_inner=8, mem_len=4))


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_makes_a_model_and_its_twin_of_equal_size(name: str):
    config = RECIPES[name]()
    assert config.recipe == name
    assert (RECIPES[name].__doc__ or "").strip()
    sizes = {sum(p.numel() for p in build_model(each, 50).parameters()) for each in (config, config.for_twin())}
    assert len(sizes) == 1


def test_twin_begins_with_the_same_weights():
    states = []
    for config in (TINY, TINY.for_twin()):
        torch.manual_seed(3)
        states.append(build_model(config, 20).state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_strings_become_solvers():
    config = SolveConfig(history=3, damping=0.5)
    assert build_solver(config) == Anderson(history=3, damping=0.5)
    assert build_solver(config, "broyden") == Broyden(history=3)
    assert build_solver(config, "picard") == Picard(damping=0.5)


def test_strings_become_adjoints():
    adjoint = build_adjoint(SolveConfig(backward_rtol=0.1, backward_max_evals=7))
    assert isinstance(adjoint, Implicit)
    assert (adjoint.stopping.rtol, adjoint.stopping.max_evals) == (0.1, 7)
    assert build_adjoint(SolveConfig(backward="phantom", phantom_steps=3)) == Phantom(steps=3)
    assert build_adjoint(SolveConfig(backward="unrolled")) == Unrolled()
    assert build_adjoint(SolveConfig(backward="checkpointed")) == Unrolled(checkpoint=True)
    assert build_adjoint(SolveConfig(backward="neumann", phantom_steps=4)) == Neumann(terms=4)
    shine = build_adjoint(SolveConfig(backward="shine", backward_rtol=0.1, backward_max_evals=7))
    assert shine == Shine(rtol=0.1, refine=6)
    reversible = SolveConfig(method="reversible", backward="reversible", damping=0.4)
    assert (build_solver(reversible), build_adjoint(reversible)) == (ReversiblePicard(damping=0.4), Reversible())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "reversible"}, r"--damping is 1.0; the reversible method needs one below 1"),
        ({"backward": "reversible"}, r"--backward is reversible; give --method reversible as well"),
        ({"backward": "shine", "method": "picard"}, r"--backward is shine; give --method anderson or broyden"),
    ],
)
def test_what_does_not_go_together_is_refused(options: dict[str, Any], words: str):
    with pytest.raises(UserError, match=words):
        SolveConfig(**options)


def test_evaluation_has_its_own_budget_if_given():
    plain = eval_stopping(SolveConfig(rtol=0.1, max_evals=9))
    assert (plain.rtol, plain.max_evals) == (0.1, 9)
    own = eval_stopping(SolveConfig(rtol=0.1, max_evals=9, eval_rtol=0.2, eval_max_evals=90))
    assert (own.rtol, own.max_evals) == (0.2, 90)


COMBINATIONS = [
    *((method, backward) for method in get_args(MethodName) for backward in ("implicit", "neumann", "phantom", "unrolled")),
    ("anderson", "shine"), ("broyden", "shine"), ("anderson", "checkpointed"), ("reversible", "reversible"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "backward"), COMBINATIONS)
def test_every_combination_trains(method: MethodName, backward: BackwardName):
    damping = 0.5 if method == "reversible" else 1.0
    solver = dataclasses.replace(TINY.solver, method=method, backward=backward, max_evals=6, damping=damping)
    model = build_model(dataclasses.replace(TINY, solver=solver), 20)
    tokens = torch.arange(10).view(2, 5)
    output = model(tokens, tokens + 1)
    output.nll.mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert len(output.stats[0].backward) == (backward in ("implicit", "shine"))
    assert output.stats[0].evaluations <= 6 + (backward == "phantom")  # whose step comes on top of the solve


def test_traced_model_shows_its_solves():
    assert trace_stopping(TINY.solver).rtol < eval_stopping(TINY.solver).rtol
    model = build_model(TINY, 20, method="picard", trace=True).eval()
    tokens = torch.arange(10).view(2, 5)
    with torch.no_grad():
        (stats,) = model(tokens, tokens + 1).stats
    assert stats.trace is not None
    assert stats.trace.shape[1] == 2
    assert stats.trace[0].min() > stats.trace[-1].max()


def test_corpus_comes_from_its_folder(tmp_path: Path):
    for name in ("train", "valid", "test"):
        (tmp_path / f"{name}.txt").write_text("one two three " * 30)
    corpus = build_corpus(DataConfig(corpus="text", data_dir=tmp_path, vocab_size=260))
    assert corpus.tokenizer.size <= 260
    assert corpus.test.text_bytes == 14 * 30
    with pytest.raises(UserError, match="--data-dir"):
        build_corpus(DataConfig(corpus="text"))
    with pytest.raises(UserError, match="python-docs"):
        build_corpus(DataConfig(corpus="python-docs", data_dir=tmp_path))
