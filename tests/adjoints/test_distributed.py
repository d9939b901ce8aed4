"""An equilibrium layer under DistributedDataParallel."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORKER = """
import sys, torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from equilibria import DEQ, Implicit, Stopping

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4).double()
    def forward(self, z, x):
        return 0.7 * torch.tanh(self.inner(z) + x)

rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
torch.manual_seed(0)
tight = Stopping(rtol=1e-12, max_evals=200)
module = DEQ(Block(), stopping=tight, adjoint=Implicit(stopping=tight))
whole, x = [], torch.randn(6, 4).double()
for _ in range(2):
    loss = module(x).z.square().sum(1).mean()
    whole.append(torch.autograd.grad(loss, list(module.parameters())))
dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
parallel = DistributedDataParallel(module)
for expected in whole:  # twice: the reducer is ready again after a backward pass
    parallel.zero_grad()
    parallel(x[rank::2]).z.square().sum(1).mean().backward()
    for parameter, gradient in zip(module.parameters(), expected):
        assert torch.allclose(parameter.grad, gradient, rtol=1e-9, atol=1e-12), (parameter.grad, gradient)
dist.destroy_process_group()
print("agreed")
"""


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="PyTorch was built without gloo")
def test_distributed_data_parallel_equals_one_process(tmp_path: Path) -> None:
    """Two processes with half of the batch each: the averaged gradient is that of the whole batch."""
    command = [sys.executable, "-W", "ignore", "-c", WORKER]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    workers = [
        subprocess.Popen([*command, str(rank), str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                         env=environment)
        for rank in (0, 1)
    ]  # fmt: skip
    try:
        outputs = [worker.communicate(timeout=120)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert ["agreed" in output for output in outputs] == [True, True], "\n".join(outputs)
