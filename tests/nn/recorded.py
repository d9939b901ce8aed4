"""Recorded components of the original system: their tensors, and how near ours must come."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

TOLERANCES = {torch.float64: 1e-11, torch.float32: 2e-5}  # relative, in the 2-norm of a tensor


def read(folder: Path, dtype: torch.dtype) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """The configuration, and each group of tensors by name; a tensor "div4/param.x" is ["div4"]["param.x"]."""
    groups: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(folder / "tensors.safetensors").items():
        group, _, name = key.rpartition("/")
        groups.setdefault(group, {})[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    return json.loads((folder / "config.json").read_text(encoding="utf-8")), groups


def starting_with(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def same(found: Tensor | None, recorded: Tensor) -> None:
    assert found is not None
    assert found.shape == recorded.shape
    assert found.dtype == recorded.dtype
    error, scale = torch.linalg.vector_norm(found - recorded), torch.linalg.vector_norm(recorded)
    assert error <= TOLERANCES[recorded.dtype] * scale, f"relative error {error / scale:.1e}"


def load(module: nn.Module, names: Mapping[str, str], recorded: Mapping[str, Tensor]) -> None:
    """Fill every parameter of `module` with the recorded one; `names` are patterns of recorded names -> ours."""
    module.to(next(iter(recorded.values())).dtype)
    module.load_state_dict({renamed(name, names): tensor for name, tensor in recorded.items()}, strict=True)


def same_gradients(module: nn.Module, names: Mapping[str, str], recorded: Mapping[str, Tensor]) -> None:
    """Every parameter has the recorded gradient; one without a recording was not used, and has gradient zero."""
    expected = {renamed(name, names): tensor for name, tensor in recorded.items()}
    parameters = dict(module.named_parameters())
    assert expected.keys() <= parameters.keys()
    for name, parameter in parameters.items():
        same(parameter.grad, expected.get(name, torch.zeros_like(parameter)))


def renamed(name: str, names: Mapping[str, str]) -> str:
    for recorded, ours in names.items():
        name = re.sub(recorded, ours, name)
    return name
