"""Options as they were typed, to say how a command is to be typed next time."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

OF_ONE_START = ("resume", "run-dir")
"""Options that say which run it is, and not what it does."""


def add_command(path: Path, words: Sequence[str]) -> None:
    """Add a line to the command.txt of a run."""
    with path.open("a", encoding="utf-8") as file:
        file.write(shlex.join(words) + "\n")


def options_of(path: Path) -> list[str]:
    """The options of all the commands in a command.txt; [] where there is none, or it is damaged."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        words = [word for line in lines for word in shlex.split(line)[3:]]
    except (OSError, ValueError):
        return []
    return without(words, *OF_ONE_START)


def without(words: Sequence[str], *names: str) -> list[str]:
    """The words less these options and their values; of an option that stands there twice, the last counts.

    >>> without(["--max_evals=3", "--betas", "0.9", "0.98", "--no-twin", "--lr", "1", "--lr", "2"], "betas", "max-evals")
    ['--no-twin', '--lr', '2']
    """
    groups: dict[str, list[str]] = {}
    name = ""
    for word in words:
        if word.startswith("--"):
            name = word.partition("=")[0].removeprefix("--").replace("_", "-")
            groups.pop(name, None)
        groups.setdefault(name, []).append(word)
    return [word for name, group in groups.items() if name not in names for word in group]
