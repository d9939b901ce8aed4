"""What the README and the pages under docs/ say can be run."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]


# PyTorch's own, where it compiles.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:`torch._prims_common.check`:FutureWarning")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_blocks_run(page: Path) -> None:
    """One after the other, so that a later block may use what an earlier one made."""
    names: dict[str, object] = {"__name__": "page"}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        if "torch.compile" in block and shutil.which(os.environ.get("CXX", "g++")) is None:
            continue  # the compiler of PyTorch needs one for C++
        exec(compile(block, page.name, "exec"), names)


def test_there_is_one_test_command_for_ci_to_run() -> None:
    commands = re.findall(r"^python3 -m venv .* -m pytest$", README.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(commands) == 1


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target
