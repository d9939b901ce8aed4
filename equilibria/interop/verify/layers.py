"""One Transformer layer: the shift to relative positions, who sees whom, attention, the whole of f and its gradients."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from equilibria.interop.original.configuration import UNLIMITED
from equilibria.interop.original.names import translate
from equilibria.interop.verify.cases import Case
from equilibria.interop.verify.report import Report
from equilibria.interop.verify.tolerances import Limits
from equilibria.models.block import Memory, TransformerBlock
from equilibria.nn.relative_attention import relative_mask, relative_shift, sinusoidal_positions


def check(case: Case, dtype: torch.dtype, limits: Limits, report: Report) -> None:
    recorded = case.tensors("tensors", dtype)
    (limit,) = limits["all tensors"]
    for name, variant in case.config["variants"].items():
        tensors = recorded.under(f"{name}/")
        length, memory, window = variant["qlen"], variant["mlen"], variant["local"] or UNLIMITED

        padded = torch.cat((torch.zeros_like(tensors["rel_shift_in"][..., :1]), tensors["rel_shift_in"]), dim=-1)
        report.relative("rel_shift", relative_shift(padded), tensors["rel_shift_out"], limit, name)
        report.exact("mask", torch.equal(_hidden(length, memory, window, tensors["z"]), tensors["mask"].bool()), name)
        distances = torch.arange(length + memory - 1, -1, -1, dtype=dtype)
        positions = sinusoidal_positions(distances, tensors["pos"].shape[1]).T[None]
        report.relative("pos", positions, tensors["pos"], limit, name)

        block = _block(variant, tensors.under("param."), dtype)
        z, u, mems = (tensors[key].clone().requires_grad_() for key in ("z", "u", "mems"))  # (B, channels, columns)
        past = Memory(mems.mT, u[..., :memory].mT)
        args = block.prepare(u[..., memory:].mT, past, None, window)
        out = block(z.mT, *args).mT
        report.relative("attention_out", _attention(block, z.mT, args).mT, tensors["attention_out"], limit, name)
        report.relative("out", out, tensors["out"], limit, name)
        inputs = {"z": z, "u": u, "mems": mems}
        ours = torch.autograd.grad(out, [*inputs.values(), *block.parameters()], tensors["upstream"])
        names = [*inputs, *(f"deq.block.{key}" for key, _ in block.named_parameters())]
        gradients = dict(tensors.under("grad."))
        theirs = {key: gradients.pop(key) for key in inputs} | translate(_of_layer(gradients))
        for key, gradient in zip(names, ours, strict=True):
            report.relative("grad", gradient, theirs[key], limit, f"{name}: {key}")


def _block(variant: Mapping[str, Any], parameters: Mapping[str, Tensor], dtype: torch.dtype) -> TransformerBlock:
    block = TransformerBlock(
        variant["n_head"] * variant["d_head"],
        variant["n_head"],
        variant["d_inner"],
        pre_norm=variant["pre"],
        weight_norm=variant["wn"],
    )
    state = translate(_of_layer(parameters))
    block.to(dtype).load_state_dict({key.removeprefix("deq.block."): tensor for key, tensor in state.items()})
    return block


def _of_layer(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By the names that a model gives them."""
    return {f"func.{key}": tensor for key, tensor in tensors.items()}


def _hidden(length: int, memory: int, window: int, like: Tensor) -> Tensor:
    """(L, K) bool: which key a query must not see."""
    added = relative_mask(length, memory, window, like=like)
    if added is None:
        return torch.zeros(length, length + memory, dtype=torch.bool)
    return relative_shift(added) == -math.inf


def _attention(block: TransformerBlock, z: Tensor, args: tuple[Any, ...]) -> Tensor:
    """Attention with its residual, (B, L, d): normalised unless the block normalises before each part."""
    injection, past, weights, positions, masks, _padding = args
    normed = block._norm(z) if block.pre_norm else z
    attended = z + block._attend(normed, injection, past, weights, positions, masks.weights)
    return attended if block.pre_norm else block._norm(attended)
