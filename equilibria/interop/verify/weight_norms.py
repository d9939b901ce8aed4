"""Weight norm: how a weight is split into length and direction, what they make, their gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from equilibria.interop.verify.cases import Case
from equilibria.interop.verify.report import Report
from equilibria.interop.verify.tolerances import Limits
from equilibria.nn.parametrizations import weight_norm


def check(case: Case, dtype: torch.dtype, limits: Limits, report: Report) -> None:
    recorded = case.tensors("tensors", dtype)
    (limit,) = limits["all tensors"]
    for name, variant in case.config["variants"].items():
        tensors = recorded.under(f"{name}/")
        module: Any = nn.Module()
        module.register_parameter("weight", nn.Parameter(tensors["w_initial"]))
        weight = weight_norm(module, dim=variant["dim"]).parametrizations.weight
        report.relative("g_initial", weight.original0, tensors["g_initial"], limit, name)
        report.relative("w_initial", module.weight, tensors["w_initial"], limit, name)
        with torch.no_grad():
            weight.original0.copy_(tensors["g"])
            weight.original1.copy_(tensors["v"])
        made = module.weight
        report.relative("w", made, tensors["w"], limit, name)
        grad_g, grad_v = torch.autograd.grad(made, (weight.original0, weight.original1), tensors["upstream"])
        report.relative("grad.g", grad_g, tensors["grad.g"], limit, name)
        report.relative("grad.v", grad_v, tensors["grad.v"], limit, name)
