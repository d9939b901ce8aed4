"""One TrellisNet layer: the causal convolution with its history, the whole of f, its gradients."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from equilibria.interop.original.names import translate
from equilibria.interop.verify.cases import Case
from equilibria.interop.verify.report import Report
from equilibria.interop.verify.tolerances import Limits
from equilibria.models.trellis_block import TrellisBlock


def check(case: Case, dtype: torch.dtype, limits: Limits, report: Report) -> None:
    recorded = case.tensors("tensors", dtype)
    (limit,) = limits["all tensors"]
    for name, options in case.config["variants"].items():
        tensors = recorded.under(f"{name}/")
        sizes = (options["nhid"], options["nout"], options["k"], options["dil"])
        block = TrellisBlock(*sizes, weight_norm=options["wn"]).to(dtype)
        block.load_state_dict(_ours(tensors.under("param.")))
        x = tensors["x"].mT  # (B, L, H)
        for key, before in (("conv_out", tensors["hid"].mT), ("conv_out_without_hid", torch.zeros_like(x[:, :1]))):
            columns = torch.cat((before.expand(-1, block.conv.reach, -1), x), dim=1)
            report.relative(key, block.conv(columns).mT, tensors[key], limit, name)
        inputs = {key: tensors[key].clone().requires_grad_() for key in ("z", "u", "z0")}  # (B, channels, columns)
        out = block(inputs["z"].mT, *block.prepare(inputs["u"].mT, inputs["z0"].mT)).mT
        report.relative("layer_out", out, tensors["layer_out"], limit, name)
        leaves = {**inputs, **dict(block.named_parameters())}
        gradients = dict(tensors.under("grad."))
        theirs = {key: gradients.pop(key) for key in inputs} | _ours(gradients)
        report.exact("grad: parameters", theirs.keys() == leaves.keys(), name)
        ours = torch.autograd.grad(out, list(leaves.values()), tensors["upstream"], materialize_grads=True)
        for key, gradient in zip(leaves, ours, strict=True):
            report.relative("grad", gradient, theirs[key], limit, f"{name}: {key}")


def _ours(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By the names of a block."""
    named = {f"trellisnet.func.{key}": tensor for key, tensor in tensors.items()}
    return {key.removeprefix("deq.block."): tensor for key, tensor in translate(named).items()}
