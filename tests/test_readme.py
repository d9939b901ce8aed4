"""What the README and the pages of the manual say can be run."""

from __future__ import annotations

import os
import re
import shutil
import tomllib
from pathlib import Path

import pytest
from pages import LANGUAGES, PAGES, README, ROOT, SHELL, Command, anchors, blocks, commands, links, name

EVERY_PAGE = pytest.mark.parametrize("page", PAGES, ids=name)


# PyTorch's own, where it compiles.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:`torch._prims_common.check`:FutureWarning")
@EVERY_PAGE
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other, so that a later block may use what an earlier one made, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "page"}
    for block in blocks(page):
        if block.language != "python":
            continue
        if "torch.compile" in block.text and shutil.which(os.environ.get("CXX", "g++")) is None:
            continue  # the compiler of PyTorch needs one for C++
        exec(compile(block.text, page.name, "exec"), names)


@EVERY_PAGE
def test_blocks_say_what_they_are(page: Path) -> None:
    unknown = {block.language or "none" for block in blocks(page)} - set(LANGUAGES)
    assert not unknown, f"{name(page)} has blocks of {unknown}; what is not run is `text`"


OTHERS = {
    "python3",
    "pip",
    "git",
    "cd",
    "export",
    "tensorboard",
    "mkdocs",
    "nvidia-smi",
    "lm-eval",
    "lm_eval",
    "srun",
    "sbatch",
}
PROGRAMS = sorted(
    {(name(page), command) for page in PAGES for command in commands(page) if command.words[0] != "equilibria"}, key=str
)


@pytest.mark.parametrize(("page", "command"), PROGRAMS, ids=str)
def test_other_commands_name_what_exists(page: str, command: Command) -> None:
    """A script, a module or an extra that a page names is there."""
    program, *rest = command.words
    assert program in OTHERS | {"python"} or program.startswith("./"), f"{page} names a program {program}"
    for word in rest:
        if word.endswith(".py"):
            assert (ROOT / word).is_file(), f"{page} names {word}"
    if rest[:1] == ["-m"] and rest[1].startswith("equilibria"):
        assert (ROOT / rest[1].replace(".", "/")).exists(), f"{page} names {rest[1]}"
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for group in re.findall(r"(?:equilibria|\.)\[([\w,]+)\]", str(command)):
        assert set(group.split(",")) <= set(extras), f"{page} installs the extra {group}"


def test_there_is_one_test_command_for_ci_to_run() -> None:
    found = re.findall(r"^python3 -m venv .* -m pytest$", README.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(found) == 1


@EVERY_PAGE
def test_links_lead_somewhere(page: Path) -> None:
    for target in links(page):
        path, _, anchor = target.partition("#")
        there = page.parent / path if path else page
        assert there.exists(), target
        if anchor and there.suffix == ".md" and "reference" not in there.parts:  # those, the build of the site checks
            assert anchor in anchors(there), f"{target}: there are {sorted(anchors(there))}"


def test_commands_are_found() -> None:
    """Guards the tests of commands against a reader that finds none."""
    assert Command(("equilibria", "train", "quickstart")) in list(commands(README))
    assert sum(block.language in SHELL for page in PAGES for block in blocks(page)) > 10
