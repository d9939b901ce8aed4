"""Every mistake gives exactly one line that says what to do, and exit code 2."""

from __future__ import annotations

import builtins
import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from equilibria.cli import main as entry
from equilibria.cli.main import HELP, main
from equilibria.models.deq_transformer import DEQTransformerLM

Failure = Callable[..., str]


def test_unknown_command(failure: Failure):
    assert "there is no command trian; did you mean train?" in failure("trian")
    assert "choose train, eval, generate" in failure("xyz")


def test_scale_is_checked_and_not_for_resumed_runs(failure: Failure, trained: Path):
    assert "--scale is 0.0; give a number above zero" in failure("train", "quickstart", "--scale", "0")
    assert "--scale" in failure("train", "quickstart", "--scale", "big")
    assert "leave --scale out" in failure("train", "text", "--resume", "--run-dir", trained, "--scale=0.5")


def test_unknown_recipe(failure: Failure):
    message = failure("train", "penn-treebank")
    assert "did you mean penn-treebank-transformer or penn-treebank-trellisnet or" in message
    assert "or penn-treebank-char?" in message
    assert "there is no recipe quikstart; did you mean quickstart?" in failure("train", "quikstart")
    assert "choose quickstart" in failure("train", "zzz")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("train quickstart --stepz 3", "--stepz, 3; did you mean --steps?"),
        ("train quickstart --d-mode 3", "did you mean --d-model"),
        ("train quickstart more", "Unrecognized options: more"),
        ("train quickstart --lr abc", "Error parsing --lr: could not convert string to float: 'abc'"),
        ("train quickstart --lr", "Missing value for argument '--lr'"),
        ("train quickstart --method newton", "invalid choice 'newton' for argument '--method'"),
        ("train quickstart --steps 0", "--steps is 0; give a number above zero (see equilibria train quickstart --help)"),
        ("train quickstart --steps -5", "--steps is -5; give a number above zero"),
        ("train quickstart --d-model 30", "--d-model is 30; give an even multiple of --n-head 4"),
        ("eval", "missing: RUN (see equilibria eval --help)"),
        ("eval somewhere --split dev", "invalid choice 'dev'"),
        ("generate somewhere", "missing: --prompt STR"),
        ("generate somewhere --prompt x --temperature -1", "--temperature is -1.0; give a finite number, 0 or more"),
        ("generate somewhere --prompt x --top-p 2", "--top-p is 2.0; give a probability"),
        ("generate somewhere --prompt x --tokens 0", "--tokens is 0; give at least 1"),
    ],
)
def test_wrong_options(failure: Failure, argv: str, said: str):
    assert said in failure(*argv.split())


def test_missing_and_empty_text(failure: Failure, text_dir: Path, small: list[str], tmp_path: Path):
    run = tmp_path / "run"
    assert "name the folder with --data-dir" in failure("train", "text", "--run-dir", run)
    absent = tmp_path / "absent"
    assert "absent does not exist" in failure("train", "text", "--data-dir", absent, "--run-dir", run)
    broken = tmp_path / "broken"
    shutil.copytree(text_dir, broken)
    (broken / "valid.txt").write_text("")
    message = failure("train", "text", "--data-dir", broken, "--run-dir", run)
    assert "valid.txt is empty; put text into it" in message
    (broken / "train.txt").unlink()
    assert "nothing in" in failure("train", "text", "--data-dir", broken, "--run-dir", run)
    assert not run.exists(), "a command that fails at once leaves no folder"
    (broken / "valid.txt").write_text("the cat\n")
    (broken / "train.txt").write_text("the cat\n")
    message = failure("train", "text", "--data-dir", broken, "--run-dir", run, *small, "--batch-size", "64")
    assert "too few for a batch size of 64" in message


def test_run_folder_mistakes(failure: Failure, trained: Path, text_dir: Path, tmp_path: Path):
    assert "there is no run folder" in failure("eval", tmp_path / "absent")
    assert "is not a run: it has no config.json" in failure("eval", tmp_path)
    assert "there is no run folder" in failure("generate", tmp_path / "absent", "--prompt", "x")
    message = failure("train", "text", "--data-dir", text_dir, "--run-dir", trained)
    assert "exists already; add --resume to continue it" in message
    assert "there is no run folder" in failure("train", "text", "--resume", "--run-dir", tmp_path / "absent")
    message = failure("train", "quickstart", "--resume", "--run-dir", trained)
    assert f"is a run of text, not of quickstart; use: equilibria train text --resume --run-dir {trained}" in message


def test_a_converted_run_has_no_training_to_resume(failure: Failure, trained: Path, tmp_path: Path):
    config = json.loads((trained / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"recipe": "converted"}))
    message = failure("train", "text", "--resume", "--run-dir", tmp_path)
    assert f"{tmp_path} was converted, not trained by a recipe" in message


def test_no_run_to_resume(failure: Failure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert "there is no run of quickstart in runs to resume" in failure("train", "quickstart", "--resume")


@pytest.mark.parametrize(
    ("option", "said"),
    [("--d-model 32", "d_model 16 -> 32"), ("--batch-size 8", "batch_size 4 -> 8"), ("--seed 5", "seed 0 -> 5")],
)
def test_resume_keeps_what_the_checkpoint_depends_on(failure: Failure, trained: Path, option: str, said: str):
    before = (trained / "config.json").read_bytes()
    message = failure("train", "text", "--resume", "--run-dir", trained, *option.split())
    assert f"a resumed run cannot change {said}" in message
    assert (trained / "config.json").read_bytes() == before


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Path:
    """A copy of the finished run that a test may damage."""
    return shutil.copytree(trained, tmp_path / "copy")


def test_damaged_checkpoints(failure: Failure, copy: Path):
    path = copy / "best" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    for optimizer in copy.glob("checkpoints/*/optimizer.safetensors"):
        optimizer.write_bytes(b"rubbish")
    for argv in (["eval", copy], ["generate", copy, "--prompt", "x"], ["train", "text", "--resume", "--run-dir", copy]):
        message = failure(*argv)
        assert f"all 2 checkpoints in {copy / 'checkpoints'} cannot be used: " in message
        assert "optimizer.safetensors is damaged: its content is not what was written; restore one of" in message
    shutil.rmtree(copy / "checkpoints")
    assert "model.safetensors is damaged" in failure("eval", copy)
    (copy / "config.json").write_text("{]")
    assert "cannot read the configuration" in failure("eval", copy)
    (copy / "tokenizer" / "tokenizer.json").unlink()
    (copy / "config.json").write_bytes((copy / "twin" / "config.json").read_bytes())
    assert "tokenizer.json" in failure("eval", copy)


def test_checkpoint_of_another_model(failure: Failure, copy: Path):
    config = json.loads((copy / "config.json").read_text())
    config["model"]["d_inner"] = 64
    (copy / "config.json").write_text(json.dumps(config))
    message = failure("eval", copy)
    assert "holds another model: " in message
    assert "(32, 16), the model has (64, 16)" in message
    config["model"]["weight_norm"] = True
    (copy / "config.json").write_text(json.dumps(config))
    assert "is missing" in failure("generate", copy, "--prompt", "x")
    config["model"]["widht"] = 1
    (copy / "config.json").write_text(json.dumps(config))
    assert "extra fields found (widht)" in failure("eval", copy)


def test_evaluation_on_another_text(failure: Failure, trained: Path, text_dir: Path, tmp_path: Path):
    other = shutil.copytree(text_dir, tmp_path / "other")
    (other / "train.txt").write_text("entirely different words here\n" * 50)
    assert "gives another vocabulary" in failure("eval", trained, "--data-dir", other)
    assert main(["eval", str(trained), "--data-dir", str(shutil.copytree(text_dir, tmp_path / "moved"))]) == 0


def test_full_disk(failure: Failure, trained: Path, monkeypatch: pytest.MonkeyPatch):
    """Wherever it strikes, with or without the name of a file."""

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("equilibria.cli.evaluate.evaluate_run", full)
    assert (
        failure("eval", trained)
        == "equilibria: no room on the disk (No space left on device); free some space and try again"
    )


def test_empty_prompt(failure: Failure, trained: Path):
    assert "--prompt is empty" in failure("generate", trained, "--prompt", "")


def test_folder_that_cannot_be_made(failure: Failure, text_dir: Path, tmp_path: Path):
    (tmp_path / "file").touch()
    message = failure("train", "text", "--data-dir", text_dir, "--run-dir", tmp_path / "file" / "run")
    assert "cannot use" in message or "exists already" in message


def test_numbers_that_are_not_finite_exit_with_1(
    failure: Failure, text_dir: Path, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    forward = DEQTransformerLM.forward
    calls = 0

    def poisoned(self: DEQTransformerLM, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += self.training
        if calls == 5:
            with torch.no_grad():
                self.softmax.biases[0].fill_(float("nan"))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(DEQTransformerLM, "forward", poisoned)
    run = tmp_path / "run"
    message = failure("train", "text", "--data-dir", text_dir, "--run-dir", run, *small, code=1)
    assert f"step 5: the loss became infinite or NaN; the last checkpoint is that of step 3 in {run}" in message
    assert "--lr" in message


@pytest.mark.parametrize("package", ["tyro", "accelerate"])
def test_missing_extra_says_what_to_install(failure: Failure, package: str, monkeypatch: pytest.MonkeyPatch):
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args, **kwargs)

    for name in list(sys.modules):
        if name.startswith(("equilibria.cli.", "equilibria.train.", "equilibria.recipes")) and name != entry.__name__:
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", without)
    assert failure("train", "quickstart").endswith(f'{package} is missing; install it with: pip install "equilibria[lm]"')


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch):
    def broken(argv: list[str]) -> int:
        raise RuntimeError("a bug of ours")

    monkeypatch.setattr(entry, "_dispatch", broken)
    with pytest.raises(RuntimeError, match="a bug of ours"):
        main([])


def test_help_and_version(capsys: pytest.CaptureFixture[str]):
    assert main([]) == 0
    assert capsys.readouterr().out == HELP
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("equilibria 0.")
    assert main(["train"]) == 0
    recipes = capsys.readouterr().out
    assert all(name in recipes for name in ("quickstart", "text", "penn-treebank-trellisnet", "wikitext-2-transformer"))
    with pytest.raises(SystemExit) as stop:
        main(["train", "quickstart", "--help"])
    assert stop.value.code == 0
    options = capsys.readouterr().out
    assert "--max-evals INT" in options
    assert "--resume" in options
    assert "config." not in options, "names of dataclasses are no part of the options"


def test_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "equilibria", "eval", "nowhere"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == "equilibria: there is no run folder nowhere; give the folder that `equilibria train` printed\n"
