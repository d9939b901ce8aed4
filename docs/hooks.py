"""What mkdocs does to the pages besides rendering them: the help of the command line is set where a page asks for it."""

from __future__ import annotations

import contextlib
import io
import os
import re
from pathlib import Path
from typing import Any

WIDTH = "88"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """<!-- help: eval --> becomes what `equilibria eval --help` prints."""
    return re.sub(r"<!-- help: ?(.*?) -->", lambda match: f"```text\n{help_of(match[1].split())}\n```", markdown)


def help_of(words: list[str]) -> str:
    """The help of a command, without the frames of a terminal and the home folder of who builds the page."""
    from equilibria.cli.main import main

    text = io.StringIO()
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = WIDTH
    try:
        with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
            main([*words, "--help"])
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before
    if not text.getvalue():
        raise RuntimeError(f"equilibria {' '.join(words)} --help printed nothing; is equilibria[docs] installed?")
    lines = [_unframed(line) for line in text.getvalue().replace(str(Path.home()), "~").splitlines()]
    return "\n".join(line for line in lines if line is not None).strip()


def _unframed(line: str) -> str | None:
    """A line of a frame, drawn in lines or, where the output is no terminal, in blanks and hyphens."""
    if line.startswith("╭"):
        return line.strip("╭╮─ ") + ":"
    if line.startswith("╰"):
        return ""
    line = line.removeprefix("│").removesuffix("│").rstrip()
    return None if re.fullmatch(r" ?-{9,}", line) else line
