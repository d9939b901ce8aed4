"""From the plain values of a configuration to the objects that they choose."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import assert_never

from equilibria.adjoints import Adjoint, Implicit, Neumann, Phantom, Reversible, Shine, Unrolled
from equilibria.data import Corpus, load_corpus
from equilibria.models import DEQTransformerLM, DEQTrellisNetLM, TransformerConfig, TrellisConfig
from equilibria.solution import UserError
from equilibria.solvers import GMRES, Anderson, Broyden, NewtonKrylov, Picard, ReversiblePicard, Solver
from equilibria.stopping import Stopping
from equilibria.train.config import DataConfig, MethodName, RunConfig, SolveConfig, TransformerModel
from equilibria.train.solves import eval_stopping


def build_corpus(config: DataConfig, note: Callable[[str], None] = lambda line: None) -> Corpus:
    """The text, read and cut into tokens; `note` is told what was found in a text of one's own."""
    return load_corpus(
        config.corpus,
        config.data_dir,
        vocab_size=config.vocab_size,
        delay=config.delay,
        original_vocabulary=config.original_vocabulary,
        text=config.text,
        note=note,
    )


def build_solver(config: SolveConfig, method: MethodName | None = None) -> Solver:
    """The solver of the forward pass; `method` asks for another one with the same settings."""
    match method or config.method:
        case "anderson":
            return Anderson(history=config.history, damping=config.damping)
        case "broyden":
            return Broyden(history=config.history)
        case "newton-krylov":
            return NewtonKrylov()
        case "picard":
            return Picard(damping=config.damping)
        case "reversible":
            return ReversiblePicard(damping=config.damping)
        case name:
            assert_never(name)


def build_linear_solver(config: SolveConfig) -> Solver:
    """The solver of the backward pass of implicit differentiation."""
    match config.backward_method:
        case "gmres":
            return GMRES()
        case "anderson":
            return Anderson(history=config.history)
        case "broyden":
            return Broyden(history=config.history)
        case "picard":
            return Picard()
        case name:
            assert_never(name)


def build_adjoint(config: SolveConfig) -> Adjoint:
    """How gradients pass the solve."""
    match config.backward:
        case "implicit":
            stopping = Stopping(rtol=config.backward_rtol, atol=config.backward_atol, max_evals=config.backward_max_evals)
            return Implicit(solver=build_linear_solver(config), stopping=stopping)
        case "shine":
            return Shine(rtol=config.backward_rtol, refine=config.backward_max_evals - 1)
        case "neumann":
            return Neumann(terms=config.phantom_steps)
        case "phantom":
            return Phantom(steps=config.phantom_steps)
        case "unrolled":
            return Unrolled()
        case "checkpointed":
            return Unrolled(checkpoint=True)
        case "reversible":
            return Reversible()
        case name:
            assert_never(name)


def build_model(
    config: RunConfig,
    vocab_size: int,
    *,
    method: MethodName | None = None,
) -> DEQTransformerLM | DEQTrellisNetLM:
    """The language model with fresh weights. `method` serves to look at the solves of evaluation."""
    solver = config.solver
    shape = {"vocab_size": vocab_size, **dataclasses.asdict(config.model)}
    solves = {
        "solver": build_solver(solver, method),
        "stopping": Stopping(rtol=solver.rtol, atol=solver.atol, max_evals=solver.max_evals),
        # Another method than the one trained with is only looked at; some adjoints do not go with it.
        "adjoint": build_adjoint(solver) if method in (None, solver.method) else Implicit(),
        "eval_stopping": eval_stopping(solver),
    }
    try:
        if isinstance(config.model, TransformerModel):
            return DEQTransformerLM(TransformerConfig(**shape), **solves)
        return DEQTrellisNetLM(TrellisConfig(**shape), **solves)
    except ValueError as error:  # a shape that makes no model
        raise UserError(f"the model cannot be built: {error}") from error
