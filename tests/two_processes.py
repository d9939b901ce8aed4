"""What each of two processes runs for tests/train/test_two_processes.py: one mode, named on the command line."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from small_runs import CONFIG, small_corpus
from torch.utils._python_dispatch import TorchDispatchMode

from equilibria.adjoints.implicit_function import LinearSystem
from equilibria.cli.main import main
from equilibria.data import Corpus, copy_memory
from equilibria.recipes.build import build_model
from equilibria.solution import NonFiniteError, UserError
from equilibria.solvers import GMRES, Anderson
from equilibria.train.config import RunConfig, SolveConfig
from equilibria.train.distributed import ALONE, Ranks, join_job
from equilibria.train.interrupt import StopRequest
from equilibria.train.loop import Trainer
from equilibria.train.run_folder import RunFolder

# Tight solves in float64, which a strong injection lets converge, so that what is left is the order of sums.
TIGHT = SolveConfig(history=10, rtol=1e-10, atol=0.0, max_evals=150, backward_rtol=1e-10, backward_max_evals=60)


def configuration(**optim: Any) -> RunConfig:
    settings = {"batch_size": 4, "steps": 50, "pretrain_steps": 3, **optim}
    return dataclasses.replace(
        CONFIG,
        model=dataclasses.replace(CONFIG.model, dropout=0.0, inject_std=5.0),
        solver=TIGHT,
        optim=dataclasses.replace(CONFIG.optim, **settings),
        eval_every=25,
        eval_batch_size=3,
        trackers=(),
    )


def sequences(count: int = 5) -> Corpus:
    """Five sequences, so that the last batch of four has one: too few for two processes. Of seven it has three."""
    return copy_memory(2, train=count, valid=3, test=3)


def trainer(config: RunConfig, corpus: Corpus, folder: Path, ranks: Ranks = ALONE, **options: Any) -> Trainer:
    torch.manual_seed(config.seed)
    model = build_model(config, corpus.tokenizer.size).double()
    if ranks.is_main:
        RunFolder(folder).store_config(config)
    return Trainer(model, corpus, config, RunFolder(folder), stop=StopRequest(), ranks=ranks, **options)


CASES: dict[str, tuple[RunConfig, Callable[[], Corpus]]] = {
    "plain": (configuration(), small_corpus),
    "accumulated": (configuration(accumulate=2, batch_chunk=2, steps=12), small_corpus),
    "unequal parts": (configuration(pretrain_steps=0, steps=4, length=22, batch_chunk=3), lambda: sequences(7)),
    "uneven": (configuration(pretrain_steps=0, steps=6, length=22), sequences),
}


class Collectives(TorchDispatchMode):
    """Writes down solves and what processes send each other: I for the start of a solve, S for a step, C."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            self.seen += "C"
        return func(*args, **(kwargs or {}))

    def watch(self, solver: type) -> None:
        for name, letter in (("init", "I"), ("step", "S")):
            original = getattr(solver, name)

            def noted(*args: Any, _original: Any = original, _letter: str = letter) -> Any:
                self.seen += _letter
                return _original(*args)

            setattr(solver, name, noted)


def compare(folder: Path) -> None:
    """Every case replicated and sharded; a resumed run; solves of unequal length; a failure of one process."""
    ranks = join_job()
    found: dict[str, Any] = {}
    run: Any = None
    for parallel in ("ddp", "fsdp"):
        for name, (config, corpus) in CASES.items():
            run = trainer(dataclasses.replace(config, parallel=parallel), corpus(), folder / f"{parallel}-{name}", ranks)
            run.run()
        for lanes in (1, 2, 3):
            run.config = dataclasses.replace(run.config, eval_batch_size=lanes)
            found[f"{parallel}-valid-{lanes}"] = run.evaluate("valid").nll
        resumed = trainer(
            dataclasses.replace(CASES["plain"][0], parallel=parallel), small_corpus(), folder / f"from-1-{parallel}", ranks
        )
        assert resumed.state.step == 25
        resumed.run()

        config = dataclasses.replace(configuration(pretrain_steps=0, steps=4), parallel=parallel)
        unequal = trainer(config, small_corpus(), folder / f"{parallel}-unequal", ranks)
        deq: Any = unequal._plain_model().deq
        deq.stopping = dataclasses.replace(deq.stopping, rtol=1e-14, max_evals=4 + 30 * ranks.rank)
        for _ in range(2):
            unequal._step()
        collectives = Collectives()
        collectives.watch(Anderson)
        collectives.watch(GMRES)
        with collectives:
            unequal._step()
        solves = int(unequal.recorder.window.sums()[8])
        found[f"{parallel}-evaluations"] = ranks.gather(solves)
        found[f"{parallel}-seen"] = ranks.gather(collectives.seen)
        if ranks.rank == 1:
            deq.solve = nonfinite
        try:
            unequal._step()
        except NonFiniteError as error:
            found[f"{parallel}-nonfinite"] = ranks.gather(str(error))
        found[f"{parallel}-nonfinite-backward"] = nonfinite_backward(config, folder / f"{parallel}-backward", ranks)
    if ranks.is_main:
        (folder / "found.json").write_text(json.dumps(found))
    ranks.close()


def nonfinite(*_: Any) -> Any:
    raise NonFiniteError("f became NaN")


def nonfinite_backward(config: RunConfig, folder: Path, ranks: Ranks) -> Any:
    """What each process says of a step in which a backward solve of the second is not finite."""
    run = trainer(config, small_corpus(), folder, ranks)
    solve = LinearSystem.solve

    def spoilt(self: LinearSystem, *args: Any, **options: Any) -> Any:
        self.g = self.g * math.nan
        return solve(self, *args, **options)

    if ranks.rank == 1:
        LinearSystem.solve = spoilt
    try:
        run.run()
    except NonFiniteError as error:
        return ranks.gather(str(error))
    finally:
        LinearSystem.solve = solve


def fail(folder: Path, argv: list[str]) -> None:
    """The command line, but the second process fails in its second step."""
    step = Trainer._step

    def failing(self: Trainer) -> None:
        if self.state.step == 1 and self.ranks.rank == 1:
            raise UserError("this process has had enough")
        step(self)

    Trainer._step = failing
    sys.exit(main(argv))


def stop(folder: Path, argv: list[str]) -> None:
    """The command line, but the second process alone is told to stop after some steps."""
    step = Trainer._step

    def stopping(self: Trainer) -> None:
        if self.state.step == 5 and self.ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        step(self)

    Trainer._step = stopping
    sys.exit(main(argv))


if __name__ == "__main__":
    mode, where = sys.argv[1], Path(sys.argv[2])
    if mode == "compare":
        torch.set_num_threads(1)
        compare(where)
    else:
        {"fail": fail, "stop": stop}[mode](where, sys.argv[3:])
