"""Which of the two forms of an operation is called."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest


def count_calls(monkeypatch: pytest.MonkeyPatch, module: ModuleType, *names: str) -> list[str]:
    """A list to which every call of these functions of a module adds its name."""
    called: list[str] = []

    def counted(name: str) -> Any:
        original = getattr(module, name)

        def call(*args: Any) -> Any:
            called.append(name)
            return original(*args)

        return call

    for name in names:
        monkeypatch.setattr(module, name, counted(name))
    return called
