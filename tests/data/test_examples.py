from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import equilibria.data

MODULES = [module.name for module in pkgutil.iter_modules(equilibria.data.__path__)]


@pytest.mark.parametrize("module", MODULES)
def test_examples_run(module: str) -> None:
    assert doctest.testmod(importlib.import_module(f"equilibria.data.{module}"), report=True).failed == 0
