"""What a model refuses as the memory of a segment, whatever its shapes are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def check_tensors(memory: Any, kind: type[tuple[Tensor, ...]], like: Tensor, *, joined: bool) -> None:
    """Refuse a memory that no model with the parameter `like` can read: only what would fail.

    Under autocast a memory may be of the lower precision, and after it of the parameters' again. `joined` says that the
    memory is joined with the states, which are of the parameters' dtype, so that a lower one is promoted.

    Raises:
        TypeError: the memory is no `kind`, or not of tensors.
        ValueError: a tensor is on another device than `like`, or of a dtype that the model cannot read.
    """
    if not isinstance(memory, kind):
        raise TypeError(
            f"memory is a {type(memory).__name__}; give the {kind.__name__} that the segment before returned, or None at "
            "the start of a text"
        )
    for i, tensor in enumerate(memory):
        name = f"memory[{i}]"
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}; a {kind.__name__} is made of tensors")
        if tensor.device != like.device:
            raise ValueError(
                f"{name} is on {tensor.device} and the model on {like.device}; move it there, or the model to the memory"
            )
        if not _readable(tensor.dtype, like, joined):
            raise ValueError(
                f"{name} has dtype {tensor.dtype} and the model {like.dtype}; give it that dtype, as by .to({like.dtype})"
            )


def _readable(dtype: torch.dtype, like: Tensor, joined: bool) -> bool:
    if dtype == like.dtype:
        return True
    kind = like.device.type
    if torch.is_autocast_enabled(kind):
        # Autocast leaves float64 alone, and knows no third precision.
        return dtype in (torch.float32, torch.get_autocast_dtype(kind)) and (joined or like.dtype != torch.float64)
    return joined and dtype.is_floating_point and torch.promote_types(dtype, like.dtype) == like.dtype
