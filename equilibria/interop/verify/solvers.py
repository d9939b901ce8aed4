"""Broyden's method as released in 2019, on recorded problems."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from equilibria.interop.original.solvers import Broyden2019, broyden_2019
from equilibria.interop.verify.cases import Case
from equilibria.interop.verify.report import Report
from equilibria.interop.verify.tolerances import Limits


def check_2019(case: Case, dtype: torch.dtype, limits: Limits, report: Report) -> None:
    recorded = case.tensors("tensors", dtype)
    for name, said in case.config["problems"].items():
        tensors = recorded.under(f"{name}/")
        f = problem(name, tensors, said["trace"][0])
        options = {"threshold": said["threshold"], "eps": said["eps"], "line_search": said["ls"]}
        ours = broyden_2019(f, tensors["x0"], **options, last_if_none_better=True)
        report.exact("prot_break", ours.prot_break == said["prot_break"], name)
        _check_trace(name, said, ours, limits, report)
        if not said["prot_break"]:  # elsewhere the result need not be the original's
            converged, otherwise = limits["result"]
            limit = converged if float(said["diff"]) < said["eps"] else otherwise
            report.relative("result", ours.result, tensors["result"], limit, name)
            if "exact" in tensors and float(said["diff"]) < said["eps"]:
                report.relative("exact", ours.result, tensors["exact"], otherwise, name)
            if "diff_detail" in tensors and _above_rounding(said):
                report.relative("diff_detail", ours.diff_detail, tensors["diff_detail"], otherwise, name)
            if "iterates" in tensors:
                report.relative("iterates", torch.stack(ours.iterates), tensors["iterates"], limit, name)


def _check_trace(name: str, said: Mapping[str, Any], ours: Broyden2019, limits: Limits, report: Report) -> None:
    (limit,), (steps,) = limits["trace"], limits["nstep"]
    report.trace(f"trace: {name}", ours.trace, said["trace"], limit)
    for key in ("nstep", "tnstep", "lowest_step"):
        report.add(key, abs(getattr(ours, key) - said[key]), steps, name)
    if _above_rounding(said):
        report.add("diff", abs(ours.diff - said["diff"]) / (said["diff"] or 1.0), limit, name)


def _above_rounding(said: Mapping[str, Any]) -> bool:
    """Whether the last residual has digits to compare."""
    return math.isfinite(float(said["diff"])) and float(said["diff"]) >= 1e-6 * float(said["trace"][0])


def problem(name: str, tensors: Mapping[str, Tensor], first: Any = None) -> Callable[[Tensor], Tensor]:
    """f of a recorded problem, from x (B, d, L); g = f(x) - x.

    Two problems come without tensors of their own: `no_root`, g = 10³ (x² + 1), and `explode`, of which no formula is
    recorded; g = 50 exp(20 x) has its first residual and overflows in its second. Where the first residual is 0, f(x) = x.
    """
    if "A" in tensors:
        return lambda x: (x.flatten(1) @ tensors["A"].T).view_as(x) + tensors["c"]
    if "JT" in tensors:
        return lambda x: (x.flatten(1) @ tensors["JT"].T).view_as(x) + tensors["grad"]
    if "W" in tensors:
        return lambda x: torch.tanh(tensors["W"] @ x + tensors["u"])
    if name.startswith("no_root"):
        return lambda x: x + 1e3 * (x.square() + 1.0)
    if name.startswith("explode"):
        return lambda x: x + 50.0 * torch.exp(20.0 * x)
    if first == 0.0:
        return lambda x: x
    raise ValueError(f"the map of problem {name} is not known: its tensors are {', '.join(tensors)}")
