"""How every kernel is started, and the sizes that Triton wants: tiles are powers of two."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Tensor | int, **compiled_in: Any) -> None:
    """Run one program for each point of the grid, on the device of the tensors."""
    where = next(a for a in arguments if isinstance(a, Tensor))
    with torch.cuda.device_of(where):
        kernel[grid](*arguments, **compiled_in)


def pieces(size: int, piece: int) -> int:
    """How many pieces cover a size."""
    return -(-size // piece)


def power_of_two(size: int) -> int:
    """The smallest power of two that is at least the size.

    >>> [power_of_two(size) for size in (1, 2, 3, 8, 9)]
    [1, 2, 4, 8, 16]
    """
    return 1 << (size - 1).bit_length()
