"""Triton compiles every kernel for NVIDIA's GPUs, as it is launched; no GPU is needed for that, nor is any used.

It runs in a process of its own, where a made-up driver stands in for the GPU.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from equilibria.kernels import choice

SHARED = 99 * 1024
"""Bytes of fast memory that a program may have on any of them from sm_80 on."""

PROGRAM = """
import json, sys, torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

class Driver:
    get_current_target = lambda self: GPUTarget("cuda", int(sys.argv[1]), 32)
    get_current_device = get_current_stream = lambda self, *_: 0

driver.set_active(Driver())
run, compiled = JITFunction.run, []

def compile_only(self, *args, warmup, **kwargs):
    kernel = run(self, *args, warmup=True, **kwargs)
    compiled.append([self.__name__, kernel.metadata.shared, len(kernel.asm["cubin"])])

JITFunction.run = compile_only
from equilibria.kernels.history import triton as history
from equilibria.kernels.relative_attention import triton as attention

v = torch.zeros(3, 5000)
ring = torch.zeros(3, 20, 5000, dtype=torch.bfloat16)
history.dots(ring, v)
history.both_dots(ring.float(), v, v)
history.store_dots(ring, 21, v, v, v)
history.combine(v.bfloat16(), v[:, :20], ring)
for dtype, width in ((torch.float32, 64), (torch.bfloat16, 128)):
    q, k = torch.zeros(2, 3, 50, width, dtype=dtype), torch.zeros(2, 3, 80, width, dtype=dtype)
    inputs = (q, q, k, k, torch.zeros(2, width, 81, dtype=dtype), torch.zeros(3, 50, 81), torch.zeros(3, 2, 50, 80))
    output, total = attention.forward(*inputs)
attention.backward((True,) * 5, inputs, output, total, q)
print(json.dumps(compiled))
"""


@pytest.mark.skipif(not choice.installed(), reason="the kernels need Triton, which is not installed here")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="Triton's wheels for x86-64 bring NVIDIA's assembler along")
def test_kernels_compile(tmp_path: Path) -> None:
    package = str(Path(__file__).parents[2])
    paths = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": paths, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", PROGRAM, "80"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
    kernels = json.loads(run.stdout)
    backward = ["_backward_queries", "_backward_keys", "_backward_positions"]
    history = ["_dots", "_dots", "_dots", "_combine"]
    assert [name for name, _, _ in kernels] == [*history, "_forward", "_forward", *backward]
    assert all(shared <= SHARED and size for _, shared, size in kernels), kernels
