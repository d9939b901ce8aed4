"""Importing from a checkout of someone else's code, which is no package."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

CLASHING = ("utils", "models", "lib")
"""Names of modules that several checkouts have."""


@contextmanager
def importing(name: str, folders: Sequence[Path]) -> Iterator[None]:
    """Inside, modules are looked for in these folders first; afterwards those of common names are called NAME.…"""
    torch.version.cuda = torch.version.cuda or "12.0"  # type: ignore[misc]  # they parse it, also where there is none
    sys.path[:0] = [str(folder) for folder in folders]
    try:
        yield
    finally:
        del sys.path[: len(folders)]
        for module in [module for module in sys.modules if module.split(".")[0] in CLASHING]:
            sys.modules[f"{name}.{module}"] = sys.modules.pop(module)
