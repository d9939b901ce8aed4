"""oneDNN's product of float32 matrices.

PyTorch multiplies float32 matrices on the CPU with MKL, which on processors of other makers than Intel leaves their
512-bit instructions unused. oneDNN, which comes with PyTorch too, uses them: 245 against 115 GFLOP/s on one core of an AMD
EPYC. PyTorch's own door to it is the operator that compiled graphs call for a linear map; it has no derivatives.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

WIDE = (
    torch.backends.cpu.get_cpu_capability() == "AVX512"
    and torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)
"""Whether the processor has products that are wider than those of MKL."""


def product(x: Tensor, weight: Tensor, bias: Tensor | None, then: str) -> Tensor:
    """(N, k), (n, k), and (n,), (N, n) or None -> (N, n); `then` is what is done to it, "none" or "relu"."""
    multiply: Any = torch.ops.mkldnn._linear_pointwise
    if bias is not None and bias.dim() == 2:
        return multiply.binary(x, bias, weight, None, "add")
    return multiply.default(x, weight, bias, then, [], "")
