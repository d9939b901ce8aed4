"""Recorded random numbers in the place of drawn ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from equilibria.nn.dropout import FrozenDropout


class Normals(TorchFunctionMode):
    """Within it `torch.randn` returns these tensors, one after the other, each in the shape asked for.

    >>> with Normals(torch.ones(6)):
    ...     torch.randn(2, 3)
    tensor([[1., 1., 1.],
            [1., 1., 1.]])
    """

    def __init__(self, *draws: Tensor) -> None:
        super().__init__()
        self.draws = list(draws)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not torch.randn:
            return func(*args, **(kwargs or {}))
        shape = args[0] if len(args) == 1 and not isinstance(args[0], int) else args
        return self.draws.pop(0).reshape(shape)


@contextmanager
def masks(recorded: Mapping[FrozenDropout, Tensor]) -> Iterator[None]:
    """Within it these dropouts draw these masks, whatever they are asked for.

    >>> drop, mask = FrozenDropout(0.5), torch.tensor([0.0, 2.0])
    >>> with masks({drop: mask}):
    ...     drop.mask(torch.ones(2))
    tensor([0., 2.])
    """
    with methods({drop: {"mask": lambda *_, mask=mask: mask} for drop, mask in recorded.items()}):
        yield


@contextmanager
def methods(replaced: Mapping[nn.Module, Mapping[str, Callable[..., Any]]]) -> Iterator[None]:
    """Within it these modules have these methods in the place of their own."""
    for module, functions in replaced.items():
        vars(module).update(functions)
    try:
        yield
    finally:
        for module, functions in replaced.items():
            for name in functions:
                del vars(module)[name]
