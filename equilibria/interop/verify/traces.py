"""Broyden's method as released, on a model at the original's tolerances: the residuals, step by step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from equilibria.interop.original.solvers import Broyden2019, Function, broyden_2019
from equilibria.interop.verify.language_models import Reading
from equilibria.interop.verify.tolerances import DEFAULTS
from equilibria.nn.computed_once import computed_once


def check_traces(reading: Reading, said: Mapping[str, Any], segment: int) -> None:
    """One training step on a segment with memory, solved whole: ‖f(z) - z‖ forward and ‖Jᵀx - x + ∂loss/∂z‖ backward."""
    evaluation = reading.case.tensors("eval", reading.dtype)
    model = reading.with_pieces(None).train()
    tokens, targets = reading.segment(evaluation, segment)
    memory = reading.recorded_memory(evaluation, "full.", segment - 1)
    with computed_once(model), torch.no_grad():
        u = model.injection(tokens)
        past = model.empty_memory(tokens.shape[0]) if memory is None else memory
        inputs = model.block_inputs(u, past, model.draw_masks(u))
        args, z0 = model.block.prepare(*inputs), model.block.initial(*inputs).mT

        def f(z: Tensor) -> Tensor:  # (B, d, L), as in the original
            return model.block(z.mT, *args).mT

        forward = broyden_2019(f, z0, threshold=said["f_thres"], eps=said["forward_eps"])
        z = f(forward.result)  # what the original returns in training, and where it takes the adjoint
        with torch.enable_grad():
            z.requires_grad_()
            (gradient,) = torch.autograd.grad(model.softmax(model.output(z.mT), targets).mean(), z)
            adjoint = _adjoint(f(z), z, gradient)
    backward = broyden_2019(adjoint, torch.zeros_like(z0), threshold=said["b_thres"], eps=said["backward_eps"])
    _check(reading, "forward", said, forward)
    _check(reading, "backward", said, backward)


def _adjoint(fz: Tensor, z: Tensor, gradient: Tensor) -> Function:
    """x -> Jᵀ x + gradient"""
    return lambda x: torch.autograd.grad(fz, z, x, retain_graph=True)[0] + gradient


def _check(reading: Reading, way: str, said: Mapping[str, Any], ours: Broyden2019) -> None:
    limits = reading.case.tolerances.get("model_broyden_trace", DEFAULTS["model_broyden_trace"])
    (every, early), (steps,) = limits["trace"], limits["lowest_step"]
    trace, report = said[f"{way}_trace"], reading.report
    report.trace(f"{way}_trace", ours.trace, trace, every)
    report.trace(f"{way}_trace, first 10", ours.trace, trace, early, first=10)
    report.add(f"{way}_lowest_step", abs(ours.lowest_step - said[f"{way}_lowest_step"]), steps)
    report.add(f"{way}_trace, steps", abs(len(ours.trace) - len(trace)), steps)
