"""The tests of the kernels need a process in which Triton's interpreter runs them, or a GPU; elsewhere they are left out.

`test_in_interpreter.py` starts such a process. On a machine with a GPU they run on it, too, in the process of all tests.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from equilibria.kernels import choice

KERNELS = ["test_history_kernels.py", "test_attention_kernels.py"]
ON_GPU = torch.cuda.is_available() and choice.installed()
if choice.INTERPRETED:
    collect_ignore = [path.name for path in Path(__file__).parent.glob("test_*.py") if path.name not in KERNELS]
elif not ON_GPU:
    collect_ignore = KERNELS


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Where the kernels run, with the kernels asked for."""
    monkeypatch.setattr(choice, "ASKED", True)
    return torch.device("cpu" if choice.INTERPRETED else "cuda")
