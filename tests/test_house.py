"""The order of the house: who may import whom, what the core depends on, and that every example in it runs."""

from __future__ import annotations

import ast
import doctest
import importlib
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "equilibria"
# A file imports from its own row and those above. The first part of a module's name behind `equilibria.` is its row.
ROWS = [
    "starting",
    "solution", "stopping", "structure", "transforms", "compiled", "products", "declared", "kernels", "solvers", "iterate",
    "adjoints", "graph", "fixed_point", "regularizers", "diagnostics", "nn", "models", "data", "train", "recipes",
    "interop", "cli", "__main__",
]  # fmt: skip
CORE = [
    "starting",
    "solution",
    "stopping",
    "structure",
    "transforms",
    "products",
    "compiled",
    "declared",
    "kernels",
    "solvers",
    "iterate",
    "adjoints",
    "graph",
    "fixed_point",
    "regularizers",
    "diagnostics",
    "nn",
    "models",
]
PLOTS = {"equilibria.diagnostics.convergence"}  # may use matplotlib, once something is to be drawn


KERNELS = [f"equilibria.kernels.{path.parent.name}.triton" for path in sorted(PACKAGE.glob("kernels/*/triton.py"))]


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def row(module: str) -> str:
    return module.split(".")[1]


def imported(module: str, path: Path) -> Iterator[str]:
    """The modules that a file imports, also inside functions; of the package's own, those that define the names."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield inner if inner in MODULES else base


IMPORTS = {module: sorted(set(imported(module, path))) for module, path in MODULES.items()}
FILES = [module for module in MODULES if module != "equilibria"]


@pytest.mark.parametrize("module", FILES)
def test_imports_go_one_way(module: str) -> None:
    assert row(module) in ROWS, f"{module} has no row: give it one in the design and here"
    for other in IMPORTS[module]:
        if other == "equilibria":
            # The root imports all of the core.
            assert ROWS.index(row(module)) > ROWS.index("models"), f"{module} imports the package root, which imports it"
        elif other.startswith("equilibria."):
            assert ROWS.index(row(other)) <= ROWS.index(row(module)), f"{module} imports {other}, which stands below it"
            assert not (row(module) == "data" and row(other) == "models"), "data knows no model"


def test_no_cycles() -> None:
    graph = {module: [other for other in IMPORTS[module] if other in MODULES and other != "equilibria"] for module in FILES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


@pytest.mark.parametrize("module", ["equilibria", *(module for module in FILES if row(module) in CORE)])
def test_core_depends_on_torch_alone(module: str) -> None:
    outside = {name.split(".")[0] for name in IMPORTS[module]} - sys.stdlib_module_names
    more = {"matplotlib"} if module in PLOTS else {"triton"} if module in KERNELS else set()
    assert outside <= {"torch", "equilibria"} | more


@pytest.mark.parametrize("module", KERNELS)
def test_kernels_are_imported_only_to_run(module: str) -> None:
    """Beside a reference, and by the functions that choose between the two: Triton need not be there."""
    assert "triton" in IMPORTS[module]
    assert module.replace(".triton", ".reference") in MODULES
    for other, path in MODULES.items():
        at_once = [node for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.ImportFrom)]
        assert other in KERNELS or not any("triton" in ast.unparse(node) for node in at_once), other


@pytest.mark.parametrize("module", sorted(PLOTS))
def test_plots_are_imported_only_to_draw(module: str) -> None:
    assert any(name.startswith("matplotlib") for name in IMPORTS[module])
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    at_once = [ast.unparse(node) for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert at_once
    assert not any("matplotlib" in line for line in at_once)


def test_the_reader_of_imports_sees_them() -> None:
    """Guards the tests above against a reader that finds nothing."""
    assert "equilibria.solvers.solver" in IMPORTS["equilibria.solvers.picard"]
    assert "equilibria.fixed_point" in IMPORTS["equilibria"]
    assert "torch" in IMPORTS["equilibria.stopping"]
    assert len(FILES) > 20


@pytest.mark.parametrize("module", ["equilibria", *(module for module in FILES if row(module) in CORE)])
def test_examples_run(module: str) -> None:
    if module in KERNELS:
        pytest.importorskip("triton", reason="the kernels need Triton, which is not installed here")
    result = doctest.testmod(importlib.import_module(module), report=True)
    assert result.failed == 0


RESULTS = {"Solution", "Stats", "Status", "Conditioning", "SpectralRadius", "Summary"}
PUBLIC = [
    (package, name)
    for package in ("equilibria", "equilibria.nn", "equilibria.regularizers", "equilibria.diagnostics")
    for name in importlib.import_module(package).__all__
    if not name.endswith("Error") and name not in RESULTS
]


@pytest.mark.parametrize(("package", "name"), PUBLIC, ids=[name for _, name in PUBLIC])
def test_public_things_show_an_example(package: str, name: str) -> None:
    public = getattr(importlib.import_module(package), name)
    assert doctest.DocTestParser().get_examples(public.__doc__ or ""), f"{name} has no runnable line in its docstring"


@pytest.mark.parametrize("name", [name for _, name in PUBLIC if name[0].isupper()])
def test_methods_name_their_source(name: str) -> None:
    package = next(package for package, other in PUBLIC if other == name)
    public = getattr(importlib.import_module(package), name)
    words = " ".join(base.__doc__ or "" for base in public.__mro__[:2])  # a variant may rest on the class it varies
    own = name in ("Stopping", "Recording")  # ours, and no method
    assert own or "Source" in words, f"{name} does not say where it comes from"
