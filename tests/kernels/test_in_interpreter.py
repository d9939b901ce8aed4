"""Runs the tests of the kernels in a process of their own: the interpreter is chosen before Triton is imported."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from equilibria.kernels import choice

pytestmark = pytest.mark.skipif(not choice.installed(), reason="the kernels need Triton, which is not installed here")


def test_kernels_in_tritons_interpreter() -> None:
    pytest.importorskip("numpy", reason="Triton's interpreter needs numpy")
    folder = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", str(folder), "-p", "no:cacheprovider"]
    package = str(folder.parents[1])
    paths = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    run = subprocess.run(command, cwd=package, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed, run.stdout[-1000:]
    assert int(passed[1]) >= 100  # a collection that finds nothing does not count
    assert "skipped" not in run.stdout
