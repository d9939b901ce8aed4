"""Which tensors go to Triton's kernels. All others, and everybody who does not ask for the kernels, get the reference."""

from __future__ import annotations

import importlib.util
import os
from functools import cache

import torch
from torch import Tensor

from equilibria.transforms import blind, recorded, reverse_alone

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton's own interpreter runs the kernels, on tensors of the CPU: slow, for tests."""
ASKED = INTERPRETED or os.environ.get("EQUILIBRIA_KERNELS") == "triton"
"""Whether the kernels may be used. They are off by default as long as nobody has timed them on a GPU."""
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@cache
def installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def fused(*tensors: Tensor) -> bool:
    """Whether a kernel may read these tensors: non-empty plain tensors on one GPU, in reverse mode at most.

    A graph that is being traced gets the reference too, which its compiler fuses with what stands around it.
    """
    if not ASKED or not (INTERPRETED or tensors[0].is_cuda):
        return False
    if not installed() or blind() or not reverse_alone():
        return False
    device = tensors[0].device
    return all(_plain(t) and t.device == device and t.dtype in DTYPES and t.numel() for t in tensors)


def fused_unrecorded(*tensors: Tensor) -> bool:
    """The same as `fused` for a kernel that has no derivative."""
    return fused(*tensors) and not recorded(*tensors)


def _plain(t: Tensor) -> bool:
    """Whether t is memory to read: no subclass, and no batch hidden in it by the older vmap, of which no level tells."""
    return type(t) in (Tensor, torch.nn.Parameter) and not t.is_neg() and not _legacy(t)


def _legacy(t: Tensor) -> bool:
    return torch._C._functorch.is_legacy_batchedtensor(t)  # pyright: ignore[reportAttributeAccessIssue]
