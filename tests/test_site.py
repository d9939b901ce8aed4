"""The site is built without a warning, names everything public, and loads nothing from elsewhere."""

from __future__ import annotations

import importlib
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from pages import ROOT

from equilibria.cli.main import COMMANDS

PACKAGES = (
    "",
    "solvers",
    "adjoints",
    "nn",
    "regularizers",
    "diagnostics",
    "models",
    "data",
    "recipes",
    "interop.huggingface",
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocstrings")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return folder


@pytest.mark.parametrize("package", PACKAGES)
def test_the_reference_has_every_public_name(package: str) -> None:
    named = {
        target.rpartition(".")[2]
        for page in (ROOT / "docs" / "reference").glob("*.md")
        for target in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
        if target.startswith(f"equilibria.{package}")
    }
    if package == "interop.huggingface":
        pytest.importorskip("transformers")
    public = importlib.import_module(f"equilibria.{package}".rstrip(".")).__all__
    missing = sorted(set(public) - named)
    assert not missing, f"docs/reference/ lacks {missing} of equilibria.{package}"


def test_every_command_has_its_help_in_the_reference() -> None:
    page = (ROOT / "docs" / "reference" / "command-line.md").read_text(encoding="utf-8")
    assert set(COMMANDS) == set(re.findall(r"^## (\w+)$", page, re.MULTILINE))


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 25
    for page in pages:
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=\"?(https?://[^\"> ]+)", text)
        assert not loaded, f"{page.name} loads {loaded}"
        assert str(ROOT) not in text
        assert str(Path.home()) not in re.sub(r"https?://\S+", "", text) or Path.home() == Path("/")


def test_docstrings_are_rendered(site: Path) -> None:
    text = (site / "reference" / "core.html").read_text(encoding="utf-8")
    assert "Solve z = f(z, *args) for every sample" in text
    assert "&gt;&gt;&gt;" not in re.sub(r"<code>.*?</code>", "", text, flags=re.DOTALL), "an example is no code block"


def test_figures_are_drawn_by_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = runpy.run_path(str(ROOT / "docs" / "figures.py"))
    light, dark = drawn["draw"]("cobweb", tmp_path)
    assert light.read_text().startswith("<?xml")
    assert dark.read_bytes() != light.read_bytes()
    committed = {path.name for path in (ROOT / "docs" / "figures").glob("*.svg")}
    assert committed == {f"{name}{suffix}.svg" for name in drawn["FIGURES"] for suffix in ("", "-dark")}


def test_measured_tables_are_those_of_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    manual = importlib.import_module("manual")
    for page, tables in manual.TABLES.items():
        text = (ROOT / "docs" / page).read_text(encoding="utf-8")
        assert manual.filled(text, tables) == text, f"run python benchmarks/manual.py: docs/{page} is behind"
