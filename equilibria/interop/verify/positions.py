"""Sinusoidal positions."""

from __future__ import annotations

import torch

from equilibria.interop.verify.cases import Case
from equilibria.interop.verify.report import Report
from equilibria.interop.verify.tolerances import Limits
from equilibria.nn.relative_attention import sinusoidal_positions


def check(case: Case, dtype: torch.dtype, limits: Limits, report: Report) -> None:
    recorded = case.tensors("tensors", dtype)
    (limit,) = limits["all tensors"]
    for name in sorted({key.split("/")[0] for key in recorded}):
        tensors = recorded.under(f"{name}/")
        ours = sinusoidal_positions(tensors["pos"], tensors["out"].shape[1]).T[None]  # (1, d, L)
        for key in {torch.float64: ("out",), torch.float32: ("out", "out_float32")}[dtype]:
            if key in tensors:
                report.relative(key, ours, tensors[key], limit, name)
