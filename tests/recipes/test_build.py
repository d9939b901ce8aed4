from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from equilibria.adjoints import Implicit, Neumann, Phantom, Reversible, Shine, Unrolled
from equilibria.recipes.build import (
    build_adjoint,
    build_corpus,
    build_linear_solver,
    build_model,
    build_solver,
)
from equilibria.solution import UserError
from equilibria.solvers import Anderson, Broyden, Picard, ReversiblePicard
from equilibria.train.config import (
    BackwardName,
    DataConfig,
    LinearName,
    MethodName,
    RunConfig,
    SolveConfig,
    TransformerModel,
    TrellisModel,
)
from equilibria.train.solves import eval_stopping, trace_stopping

TINY = RunConfig(recipe="text", model=TransformerModel(d_model=8, n_head=2, d_inner=8, mem_len=4))
TINY_TRELLIS = RunConfig(recipe="text", model=TrellisModel(d_embed=4, d_hidden=6, d_output=4))


@pytest.mark.parametrize("config", [TINY, TINY_TRELLIS], ids=["transformer", "trellisnet"])
def test_twin_begins_with_the_same_weights(config: RunConfig):
    states = []
    for each in (config, config.for_twin()):
        torch.manual_seed(3)
        states.append(build_model(each, 20).state_dict())
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


@pytest.mark.parametrize("name", get_args(LinearName))
def test_backward_solver_by_name(name: LinearName):
    """Every one of them reaches the same gradient, that of the equilibrium."""
    gradients = []
    for each in (name, "gmres"):
        solver = SolveConfig(
            method="broyden", history=60, rtol=0.0, atol=1e-7, max_evals=200, backward_method=each, backward_rtol=0.0,
            backward_atol=1e-7, backward_max_evals=200, damping=0.8,
        )  # fmt: skip
        adjoint = build_adjoint(solver)
        assert isinstance(adjoint, Implicit)
        assert (adjoint.stopping.rtol, adjoint.stopping.atol, adjoint.stopping.max_evals) == (0.0, 1e-7, 200)
        torch.manual_seed(0)
        model = build_model(dataclasses.replace(TINY_TRELLIS, solver=solver), 20)
        tokens = torch.arange(10).view(2, 5)
        model(tokens, tokens + 1).nll.mean().backward()
        gradients.append(model.block.conv.weight.grad)
    assert type(build_linear_solver(SolveConfig(backward_method=name))).__name__.lower() == name
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-7)


def test_evaluation_has_its_own_budget_if_given():
    plain = eval_stopping(SolveConfig(rtol=0.1, max_evals=9))
    assert (plain.rtol, plain.max_evals) == (0.1, 9)
    own = eval_stopping(SolveConfig(rtol=0.1, max_evals=9, eval_rtol=0.2, eval_max_evals=90))
    assert (own.rtol, own.max_evals) == (0.2, 90)
    absolute = eval_stopping(SolveConfig(rtol=0.1, atol=0.0, eval_rtol=0.0, eval_atol=1e-5))
    assert (absolute.rtol, absolute.atol) == (0.0, 1e-5)


COMBINATIONS = [
    *((method, backward) for method in get_args(MethodName) for backward in ("implicit", "neumann", "phantom", "unrolled")),
    ("anderson", "shine"), ("broyden", "shine"), ("anderson", "checkpointed"), ("reversible", "reversible"),
]  # fmt: skip


@pytest.mark.parametrize("config", [TINY, TINY_TRELLIS], ids=["transformer", "trellisnet"])
@pytest.mark.parametrize(("method", "backward"), COMBINATIONS)
def test_every_combination_trains(method: MethodName, backward: BackwardName, config: RunConfig):
    damping = 0.5 if method == "reversible" else 1.0
    solver = dataclasses.replace(TINY.solver, method=method, backward=backward, max_evals=6, damping=damping)
    model = build_model(dataclasses.replace(config, solver=solver), 20)
    tokens = torch.arange(10).view(2, 5)
    output = model(tokens, tokens + 1)
    output.nll.mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert len(output.stats[0].backward) == (backward in ("implicit", "shine"))
    assert output.stats[0].evaluations <= 6 + (backward == "phantom")  # whose step comes on top of the solve


def test_traced_model_shows_its_solves():
    assert trace_stopping(TINY.solver).rtol < eval_stopping(TINY.solver).rtol
    model = build_model(TINY, 20, method="picard").eval()
    model.deq.eval_stopping = trace_stopping(TINY.solver)
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
