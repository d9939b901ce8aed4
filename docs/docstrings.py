"""Docstrings as Markdown: examples become code blocks, and what is a sign in an equation does not become markup."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

_EXAMPLE = re.compile(r"^( *)>>> ")
_CODE = re.compile(r"(`[^`]*`)")


def as_markdown(text: str) -> str:
    """The docstring with its examples fenced, equations that span lines kept as they are, and signs escaped."""
    blocks = re.split(r"\n{2,}", text)
    return "\n\n".join(_block(block) for block in blocks)


def _block(block: str) -> str:
    lines = block.split("\n")
    start = next((i for i, line in enumerate(lines) if _EXAMPLE.match(line)), None)
    if start is not None:
        indent = " " * (len(lines[start]) - len(lines[start].lstrip()))
        before = [_escaped(line) for line in lines[:start]]
        return "\n".join([*before, "", f"{indent}```pycon", *lines[start:], f"{indent}```"]).lstrip("\n")
    if block.startswith("    "):  # code already
        return block
    if len(lines) > 1 and all("  " in line.strip() for line in lines):  # equations, one a line
        return "\n".join(f"{_escaped(line)}<br>" for line in lines)
    return "\n".join(_escaped(line) for line in lines)


def _escaped(line: str) -> str:
    """Outside of `code`: * is a sign here, never emphasis, and < is no tag."""
    parts = _CODE.split(line)
    return "".join(part if part.startswith("`") else part.replace("*", r"\*").replace("<", "&lt;") for part in parts)


class Docstrings(Extension):
    """Rewrites every docstring when griffe has read it."""

    def on_instance(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
