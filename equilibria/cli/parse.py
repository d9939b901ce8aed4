"""Options of a command as a dataclass, with tyro; a wrong one becomes a UserError of one line."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Sequence
from typing import TypeVar

import tyro

from equilibria.solution import UserError

T = TypeVar("T")


def parse(kind: type[T], argv: Sequence[str], *, command: str, description: str, default: T | None = None) -> T:
    """An instance of the dataclass `kind`. Prints help and raises SystemExit(0) if that is what argv asks for.

    Nested dataclasses are groups in the help; their names are no part of the options.
    """
    messages = io.StringIO()
    try:
        with contextlib.redirect_stderr(messages):
            options = tyro.cli(
                kind,
                args=list(argv),
                default=default,
                prog=command,
                description=description,
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.AvoidSubcommands),
            )
            assert isinstance(options, kind)
            return options
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
    raise UserError(_one_line(messages.getvalue(), command))


def _one_line(box: str, command: str) -> str:
    """The message in one of tyro's boxes, with the options it suggests and without the rest.

    A box is drawn in lines where the terminal knows them, and in blanks and hyphens where not. First comes the title;
    the message, suggestions and a word on help follow, with rules between them.
    """
    title, *lines = [line.replace("│", " ").rstrip()[2:] for line in box.splitlines() if line.strip(" ╰─╯")] or [""]
    if lines and _is_rule(lines[0]):
        del lines[0]
    end = next((i for i, line in enumerate(lines) if _is_rule(line)), len(lines))
    message, details = lines[:end], lines[end:]
    if message and message[0].startswith("Missing from"):  # a list of options, each with its help below
        names = [line.strip() for line in message[1:] if re.match(r" {4}\S", line)]
        return f"missing: {', '.join(names)} (see {command} --help)"
    text = " ".join(line.strip() for line in message).rstrip(".") or title.strip("─╮ ")
    text = re.sub(r"^Error parsing [\w.]+: ", "", text)  # the name of a dataclass, which the user never sees
    options = dict.fromkeys(match.group(1) for line in details if (match := re.match(r" {4}(--[\w-]+)", line)))
    suggested = [option for option in options if option not in text]
    hint = f"; did you mean {' or '.join(suggested[:3])}?" if suggested else ""
    return f"{text}{hint} (see {command} --help)"


def _is_rule(line: str) -> bool:
    return set(line.strip()) in ({"─"}, {"-"})
