"""Every command line in the README and the manual is taken by the real parser; the cheap ones are run."""

from __future__ import annotations

import importlib
import json
import pkgutil
import shutil
from pathlib import Path
from typing import Any

import pytest
from pages import PAGES, Command, commands

import equilibria.cli
from equilibria.cli.main import main
from equilibria.cli.parse import parse

COMMANDS = list(dict.fromkeys(command for page in PAGES for command in commands(page) if command.words[0] == "equilibria"))
OPTIONS = """
    --vocab-size 300 --d-model 16 --d-inner 32 --n-head 2 --mem-len 8 --batch-size 4 --length 8 --eval-batch-size 4
    --max-evals 4 --backward-max-evals 4 --eval-max-evals 6 --twin-depth 2 --pretrain-depth 2 --pretrain-steps 1
    --warmup-steps 1 --steps 2 --sample-tokens 8 --max-eval-steps 4 --threads 1 --corpus text --data-dir texts --no-twin
"""
TINY = OPTIONS.split()
RUN = ("eval", "generate", "report", "advise")
"""Commands that read a run, and take a second on a small one."""
TRAINED = (["quickstart"], ["text"])


MODULES = [importlib.import_module(f"equilibria.cli.{info.name}") for info in pkgutil.iter_modules(equilibria.cli.__path__)]
"""All of the commands, imported before any is changed for a test."""


class Parsed(Exception):
    """The options were good."""


def runs_named(words: tuple[str, ...]) -> list[str]:
    return [word.removesuffix("/twin") for word in words if word.startswith("runs/")]


@pytest.fixture
def place(trained: Path, text_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for folder in ("texts", "my-text", "DIR"):
        shutil.copytree(text_dir, tmp_path / folder)
    return tmp_path


def prepare(command: Command, trained: Path, recipe: str = "text") -> None:
    """Put a small run where the command expects one."""
    for run in runs_named(command.words):
        shutil.copytree(trained, run, dirs_exist_ok=True)
        stored = json.loads((Path(run) / "config.json").read_text())
        (Path(run) / "config.json").write_text(json.dumps({**stored, "recipe": recipe}))


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_the_parser_takes_it(command: Command, place: Path, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_launcher(command)
    words = list(command.words[1:])
    train = words[:1] == ["train"] and len(words) > 1
    prepare(command, trained, words[1] if train else "text")
    if train and "--resume" in words and "--run-dir" not in words:
        prepare(Command((f"runs/{words[1]}",)), trained, words[1])

    def stop(kind: Any, argv: Any, **rest: Any) -> Any:
        options = parse(kind, argv, **rest)
        if "--resume" in argv and len(seen) == 0:  # parsed twice: on top of the recipe, and of what the run has stored
            seen.append(argv)
            return options
        raise Parsed

    seen: list[Any] = []
    for module in MODULES:
        if hasattr(module, "parse"):
            monkeypatch.setattr(module, "parse", stop)
    try:
        code = 0 if words == ["data", "list"] or words[:2] == ["data", "get"] else main(words)
    except (Parsed, SystemExit) as done:
        code = getattr(done, "code", None) or 0
    assert code == 0, f"{command} is refused"


def check_launcher(command: Command) -> None:
    """torchrun and accelerate take their own options, and hand on to equilibria what is its own."""
    if not command.launcher:
        return
    argv = [*command.launcher, *command.words]
    if argv[0] == "torchrun":
        from torch.distributed.run import get_args_parser

        options = get_args_parser().parse_args(argv[1:])
    else:
        from accelerate.commands.launch import launch_command_parser

        options = launch_command_parser().parse_args(argv[2:])
    assert options.module
    assert options.training_script == "equilibria"
    assert tuple(options.training_script_args) == command.words[1:]


def cheap(command: Command) -> bool:
    """A train command changes nothing else than where it reads or begins."""
    words = [word for word in command.words[1:] if word != "--resume"]
    if command.launcher or not words or {"--dataset", "--tokenizer"} & set(words):  # which may be on the Hub
        return False
    return words[0] in RUN or (words[0] == "train" and words[1:2] in TRAINED and words[2:3] in ([], ["--data-dir"]))


@pytest.mark.parametrize("command", [command for command in COMMANDS if cheap(command)], ids=str)
def test_it_runs(command: Command, place: Path, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = list(command.words[1:])
    if words[0] != "train":
        prepare(command, trained)
    elif "--resume" in words:
        prepare(Command((f"runs/{words[1]}",)), trained, words[1])
    elif "--help" not in words:
        words += TINY
    try:
        code = main(words)
    except SystemExit as done:
        code = done.code
    assert code in (0, None), capsys.readouterr().err
