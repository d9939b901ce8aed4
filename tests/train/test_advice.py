"""Each rule speaks where it should, says what to type, and is silent elsewhere."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from small_runs import CONFIG, Make, with_optim

from equilibria.cli.parse import parse
from equilibria.cli.train import TrainOptions
from equilibria.recipes import RECIPES
from equilibria.train.adviser import Adviser, advise
from equilibria.train.config import RunConfig, SolveConfig, TrellisModel
from equilibria.train.recorder import Recorder
from equilibria.train.run_folder import RunFolder
from equilibria.train.state import TrainState

PLAIN = RunConfig(recipe="text", solver=SolveConfig(rtol=1e-2, max_evals=12, backward_max_evals=8))
Rows = list[dict[str, Any]]


def rows(count: int = 40, **changes: Any) -> Rows:
    """A run that goes well; a change is a value, or a function of the number of the row."""
    made = []
    for index in range(count):
        row = {
            "train/loss": 6.0 - 0.02 * index + 0.01 * (index % 3), "train/gradient_norm": 0.5 + 0.05 * (index % 4),
            "train/clipped": 0.0, "train/tokens": 1000 * (index + 1), "train/tokens_per_second": 500.0,
            "forward/evaluations": 6.0, "forward/residual": 0.006, "forward/unconverged": 0.0,
            "backward/evaluations": 4.0, "backward/residual": 0.006, "backward/unconverged": 0.0,
        }  # fmt: skip
        changed = {name.replace("__", "/"): value for name, value in changes.items()}
        row |= {name: value(index) if callable(value) else value for name, value in changed.items()}
        made.append({"step": 10 * (index + 1), "seconds": 2.0 * (index + 1), **row})
    return made


def validated(losses: Iterable[float], every: int = 5, seconds: float = 0.1, **values: float) -> Rows:
    """The same with validations; `seconds` is what each takes."""
    losses, made, late = list(losses), [], 0.0
    for index, row in enumerate(rows(every * len(losses))):
        made.append({**row, "seconds": row["seconds"] + late})
        if (index + 1) % every == 0:
            late += seconds
            extra = {f"valid/{name}": value for name, value in values.items()}
            made.append({"step": row["step"], "seconds": row["seconds"], "valid/loss": losses[index // every], **extra})
    return made


def with_solver(**changes: Any) -> RunConfig:
    return dataclasses.replace(PLAIN, solver=dataclasses.replace(PLAIN.solver, **changes))


UNDONE: dict[str, Any] = {"forward__unconverged": 0.9, "forward__evaluations": 12.0, "forward__residual": 0.1}
FALLING = [5.0 - 0.1 * i for i in range(8)]
SPEAKS: dict[str, tuple[str, Rows, RunConfig, str]] = {
    # kind, rows, configuration, what the remedy must hold
    "budget": ("forward budget", rows(**UNDONE), PLAIN, "--max-evals 24, or --jacobian-weight 0.5"),
    "budget, absolute": ("forward budget", rows(**UNDONE), with_solver(rtol=0.0), "--max-evals 24"),
    "budget, hopeless": ("forward budget", rows(**{**UNDONE, "forward__residual": 0.9}), PLAIN, "--max-evals 24"),
    "budget, near": ("forward budget", rows(**{**UNDONE, "forward__residual": 0.02}), PLAIN, "--max-evals 15"),
    "backward": (
        "backward budget",
        rows(backward__unconverged=0.8, backward__evaluations=8.0, backward__residual=0.3),
        with_solver(jacobian_weight=0.3),
        "--backward-max-evals 31, or --jacobian-weight 0.6",
    ),
    "harder": ("harder solves", rows(forward__residual=lambda i: 0.004 * 1.05**i), PLAIN, "--jacobian-weight 0.5"),
    "dearer": ("harder solves", rows(forward__evaluations=lambda i: min(12.0, 4 + i / 4)), PLAIN, "--jacobian-weight 0.5"),
    "validation": (
        "validation budget",
        validated(FALLING, evaluations=12.0, residual=0.1),
        PLAIN,
        "--eval-max-evals 24",
    ),
    "bf16": ("bf16 floor", [], dataclasses.replace(with_solver(rtol=1e-3), precision="bf16"), "--rtol 0.002"),
    "bf16, both": (
        "bf16 floor",
        [],
        dataclasses.replace(with_solver(rtol=0.0, backward_rtol=1e-3), precision="bf16"),
        "--rtol 0.002 --backward-rtol 0.002",
    ),
    "clipped": ("always clipped", rows(train__clipped=1.0, train__gradient_norm=8.0), PLAIN, "--clip 16"),
    "exploding": (
        "exploding gradient",
        rows(train__gradient_norm=lambda i: 90.0 if i == 30 else 0.4),
        PLAIN,
        "--lr 0.0005 --clip 0.8, or --jacobian-weight 0.5",
    ),
    "spike": ("loss spike", rows(train__loss=lambda i: 9.0 if i == 30 else 5.0), PLAIN, "--lr 0.0005 --clip"),
    "diverged early": ("loss spike", rows(6, train__loss=lambda i: 7.0 if i < 4 else 25.0), PLAIN, "--lr 0.0005"),
    "overfitting": ("overfitting", validated([5, 4.5, 4.4, 4.5, 4.6, 4.8]), PLAIN, "--steps 150"),
    "overfitting TrellisNet": (
        "overfitting",
        validated([5, 4.5, 4.4, 4.5, 4.6, 4.8]),
        dataclasses.replace(PLAIN, model=TrellisModel(output_dropout=0.2)),
        "--output-dropout 0.3",
    ),
    "validation time": ("validation time", validated(FALLING, seconds=30.0), PLAIN, "--eval-every"),
}


@pytest.mark.parametrize("case", SPEAKS)
def test_a_rule_speaks_and_what_it_says_can_be_typed(case: str):
    kind, given, config, expected = SPEAKS[case]
    found = advise(given, config)
    assert [advice.kind for advice in found] == [kind]  # once, and no other
    assert expected in found[0].remedy
    assert str(found[0]).count(". ") >= 2
    for option in re.findall(r"--[a-z0-9-]+ [0-9.e-]*\d", found[0].remedy):
        family = "penn-treebank-trellisnet-small" if "output-dropout" in option else "quickstart"
        default = TrainOptions(config=RECIPES[family]())
        parse(TrainOptions, option.split(), command="train", description="", default=default)


SILENT: dict[str, tuple[Rows, RunConfig]] = {
    "a run that goes well": (validated(FALLING, evaluations=7.0, residual=0.006), PLAIN),
    "few rows": (rows(4, **UNDONE), PLAIN),
    "a budget that is spent near the tolerance": (rows(**{**UNDONE, "forward__residual": 0.012}), PLAIN),
    "an absolute tolerance out of reach, with small residuals": (
        rows(**{**UNDONE, "forward__residual": 0.01}), with_solver(rtol=0.0)
    ),
    "a budget drawn at random": (rows(forward__evaluations=11.0), with_solver(max_evals_delta=2)),
    "bf16 at its floor": (
        rows(**{**UNDONE, "forward__residual": 0.004}), dataclasses.replace(with_solver(rtol=2e-3), precision="bf16")
    ),
    "bf16 of a stack": (
        [], dataclasses.replace(PLAIN, precision="bf16", solver=SolveConfig(rtol=1e-4),
                                model=dataclasses.replace(PLAIN.model, depth=4)),
    ),
    "backward solves a little above": (rows(backward__unconverged=0.9, backward__residual=0.03), PLAIN),
    "solves that grow within their tolerance": (rows(forward__residual=lambda i: 0.001 * 1.05**i), PLAIN),
    "evaluations that grow far from the budget": (rows(forward__evaluations=lambda i: 3 + i / 10), PLAIN),
    "clipped in the warm-up alone": (rows(train__clipped=lambda i: float(i < 5), train__gradient_norm=8.0), PLAIN),
    "clipped a little": (rows(train__clipped=1.0, train__gradient_norm=1.5), PLAIN),
    "a long gradient that is no longer than the clip": (
        rows(train__gradient_norm=lambda i: 0.9 if i == 30 else 0.05), PLAIN
    ),
    "noise": (rows(train__loss=lambda i: 5.0 + (0.4 if i % 7 == 0 else 0.1 * (i % 5))), PLAIN),
    "both losses get worse": (
        [{**row, **({"train/loss": 5 + 0.001 * row["step"]} if "train/loss" in row else {})}
         for row in validated([5, 4.5, 4.4, 4.5, 4.6, 4.8])], PLAIN,
    ),
    "a validation loss that has only stopped falling": (validated([5, 4.5, 4.4, 4.405, 4.402, 4.401]), PLAIN),
    "a stack": ([{k: v for k, v in row.items() if "ward/" not in k} for row in rows(**UNDONE)], PLAIN),
}  # fmt: skip


@pytest.mark.parametrize("case", SILENT)
def test_the_rules_are_silent(case: str):
    given, config = SILENT[case]
    assert advise(given, config) == []


def test_it_is_said_again_only_where_it_got_much_worse():
    residuals = [0.05] * 10 + [0.08] * 10 + [0.4] * 10
    given = rows(30, **{**UNDONE, "forward__residual": lambda i: residuals[i]})
    found = [advice for advice in advise(given, PLAIN) if advice.kind == "forward budget"]
    assert [advice.step for advice in found] == [50, 220]
    assert found[1].severity > 3 * found[0].severity


def test_the_warm_up_on_a_stack_counts_for_nothing():
    config = dataclasses.replace(PLAIN, optim=dataclasses.replace(PLAIN.optim, pretrain_steps=200))
    given = rows(train__loss=lambda i: 4.0 if i < 20 else 6.0)  # the loss of the stack, then that of the equilibrium
    assert [advice.kind for advice in advise(given, PLAIN)] == ["loss spike"]
    assert advise(given, config) == []


def test_a_long_run_is_looked_at_whole_in_little_space():
    adviser = Adviser(PLAIN)
    for row in rows(5000, forward__residual=lambda i: 0.002 * 1.001**i, train__loss=5.0):
        adviser.see(row)
    kept = adviser.history.rows("train/loss")
    assert len(kept) < 600
    assert kept[0]["step"] == 10
    assert kept[-1]["step"] > 49_000


def test_real_runs_that_go_wrong_are_told_and_a_resumed_one_is_not_told_again(make: Make, capsys: Any):
    config = dataclasses.replace(
        with_optim(pretrain_steps=0, steps=8, clip=1e-3, warmup_steps=0),
        solver=SolveConfig(max_evals=2, rtol=1e-6, atol=0.0, backward_max_evals=2),
    )
    make(config).run()
    said = [line for line in capsys.readouterr().err.splitlines() if "advice: " in line]
    assert any("with the budget spent (2.0 of 2 evaluations)" in line and "--max-evals" in line for line in said)
    longer = dataclasses.replace(config, optim=dataclasses.replace(config.optim, steps=12))
    make(longer).run()
    again = [line for line in capsys.readouterr().err.splitlines() if "advice: " in line]
    assert not any("with the budget spent" in line for line in again)
    assert any("gradients are clipped" in line for line in again)


def test_bf16_is_said_at_the_start_and_not_when_resumed(tmp_path: Path):
    config = dataclasses.replace(CONFIG, solver=SolveConfig(rtol=1e-3), precision="bf16", trackers=("none",))
    for step, times in ((0, 1), (4, 0)):
        said: list[str] = []
        recorder = Recorder(RunFolder(tmp_path), config, TrainState(step=step))
        recorder.open(said.append)
        recorder.close()
        assert len([line for line in said if "advice: --rtol 0.001 with --precision bf16" in line]) == times
