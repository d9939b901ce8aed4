"""What the README and the pages of the manual hold: blocks of code, commands, links."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
SHELL = ("sh", "console")
LANGUAGES = ("python", "text", "json", "toml", "yaml", *SHELL)
"""`text` is what is not run: output, formulas, and code of others."""

_FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    language: str
    text: str


@dataclass(frozen=True)
class Command:
    """Words of one command; `launcher` are those of torchrun or accelerate in front of it."""

    words: tuple[str, ...]
    launcher: tuple[str, ...] = ()

    def __str__(self) -> str:
        return shlex.join((*self.launcher, *self.words))


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> list[Block]:
    found = []
    for indent, language, text in _FENCE.findall(page.read_text(encoding="utf-8")):
        found.append(Block(language, re.sub(f"^{indent}", "", text, flags=re.MULTILINE)))
    return found


def prose(page: Path) -> str:
    """The page without its blocks of code."""
    return _FENCE.sub("", page.read_text(encoding="utf-8"))


def commands(page: Path) -> Iterator[Command]:
    """Every command in the shell blocks of a page, one a line or joined by && and |."""
    for block in blocks(page):
        if block.language in SHELL:
            for line in block.text.replace("\\\n", " ").splitlines():
                if block.language == "console" and not line.startswith("$ "):
                    continue  # what the command prints
                yield from _split(line.removeprefix("$ "))


def _split(line: str) -> Iterator[Command]:
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|")
    lexer.whitespace_split, lexer.commenters = True, "#"
    words: list[str] = []
    for word in [*lexer, ";"]:
        if set(word) <= set(";&|"):
            if words:
                yield _command(words)
            words = []
        else:
            words.append(word)


def _command(words: list[str]) -> Command:
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):  # a variable of the environment
        words = words[1:]
    words = [words[0].removeprefix(".venv/bin/"), *words[1:]]
    if words[0] == "torchrun" or words[:2] == ["accelerate", "launch"]:
        at = words.index("-m") + 1  # of the module, behind the launcher's own options
        return Command(tuple(words[at:]), tuple(words[:at]))
    if words[:3] == ["python", "-m", "equilibria"]:
        words = words[2:]
    return Command(tuple(words))


def links(page: Path) -> list[str]:
    """Targets of the links and pictures of a page that lead to other files of the repository or to places in it."""
    return re.findall(r"\]\((?!\w+:)([^) ]+)\)", prose(page))


def anchors(page: Path) -> set[str]:
    """Names of the headings as links know them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}
