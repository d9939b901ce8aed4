"""The solvers of 2021, the estimate of the Jacobian's norm for a fixed vector, and the power method."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from equilibria.diagnostics.linear import Linearised, unit
from equilibria.interop.original.solvers import Solve2021, anderson_2021, broyden_2021
from equilibria.interop.verify.cases import Case
from equilibria.interop.verify.draws import Normals
from equilibria.interop.verify.report import Report
from equilibria.interop.verify.solvers import problem
from equilibria.interop.verify.tolerances import DEFAULTS, Limits
from equilibria.regularizers import jacobian_loss


def check(case: Case, dtype: torch.dtype, limits: Limits, report: Report) -> None:
    recorded = case.tensors("tensors", dtype)
    broyden = case.tolerances.get("component_broyden", DEFAULTS["component_broyden"])
    for name, said in case.config["problems"].items():
        base, method = name.split("/", 1)
        tensors = recorded.under(f"{base}/")
        f = problem(base, tensors)
        ours = _solve(method, f, tensors["x0"], said)
        anderson = method.startswith("anderson")
        (limit,) = limits["anderson traces"] if anderson else broyden["trace"]
        for mode, trace in (("abs", ours.abs_trace), ("rel", ours.rel_trace)):
            report.trace(f"{mode}_trace: {name}", trace, said[f"{mode}_trace"], limit)
            report.exact("length of traces", len(trace) == len(said[f"{mode}_trace"]), name)
        report.add("nstep", abs(ours.nstep - said["nstep"]), broyden["nstep"][0], name)
        if "prot_break" in said:
            report.exact("prot_break", ours.prot_break == said["prot_break"], name)
        converged, otherwise = broyden["result"]
        tolerance = converged if said["lowest"] < said["eps"] else otherwise
        report.relative("result", ours.result, tensors[f"{method}/result"], tolerance, name)
        if "residual_of_result" in said:
            norm = torch.linalg.vector_norm(f(ours.result) - ours.result)
            report.relative("residual_of_result", norm, norm.new_tensor(said["residual_of_result"]), limit, name)
    _check_jacobian(recorded.under("jac/"), limits, report)
    _check_power(case, recorded.under("jac/"), recorded.under("power/"), limits, report)


def _solve(method: str, f: Any, x0: Tensor, said: Mapping[str, Any]) -> Solve2021:
    options = {"threshold": said["threshold"], "eps": said["eps"], "stop_mode": said.get("stop_mode", "rel")}
    if method.startswith("anderson"):
        return anderson_2021(
            f, x0, **options, history=said.get("m", 6), ridge=said.get("lam", 1e-4), damping=said.get("beta", 1.0)
        )
    if method.startswith("broyden"):
        return broyden_2021(f, x0, **options, line_search=said.get("ls", False))
    raise ValueError(f"no solver of 2021 is called {method}; anderson and broyden are")


def _map(z: Tensor, weight: Tensor, u: Tensor) -> Tensor:
    return torch.tanh(weight @ z + u)


def _check_jacobian(tensors: Mapping[str, Tensor], limits: Limits, report: Report) -> None:
    (limit,) = limits["jac"]
    z = tensors["z"].clone().requires_grad_()
    for key, probes in (("value_vecs1", 1), ("value_vecs2_same_v_twice", 2)):
        with Normals(*[tensors["v"]] * probes):
            value = jacobian_loss(_map, z, tensors["W"], tensors["u"], probes=probes, detach=False)
        report.relative(f"jac: {key}", value, tensors[key], limit)
        if probes == 1:
            (gradient,) = torch.autograd.grad(value, z)
            report.relative("jac: grad_z_of_value", gradient, tensors["grad_z_of_value"], limit)


def _check_power(
    case: Case, jac: Mapping[str, Tensor], tensors: Mapping[str, Tensor], limits: Limits, report: Report
) -> None:
    """v ← vᵀJ / ‖vᵀJ‖ for each sample, and |v · vᵀJ| / v · v of the last vector but one."""
    (limit,) = limits["power"]
    said = re.search(r"power_method: (\d+) iterations", str(case.config.get("jac", "")))
    jacobian = Linearised.of(_map, jac["z"], (jac["W"], jac["u"]))
    v = tensors["start"].flatten(1)
    quotient = v
    for _ in range(int(said.group(1)) if said else 60):
        pulled = jacobian.pull(v)
        quotient = (pulled * v).sum(dim=1, keepdim=True) / v.square().sum(dim=1, keepdim=True)
        v = unit(pulled)[0]
    report.relative("power: eigenvalue_abs", quotient.abs(), tensors["eigenvalue_abs"], limit)
    report.relative("power: vector", v.view_as(tensors["vector"]), tensors["vector"], limit)
