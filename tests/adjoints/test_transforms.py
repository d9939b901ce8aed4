"""torch.func over fixed points."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import normal, orthogonal, tanh_map
from torch import Tensor

from equilibria import Implicit, Stopping, fixed_point

# PyTorch's own, the first time that forward mode is used.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

TIGHT = Stopping(rtol=1e-13, atol=1e-14, max_evals=200)
X = normal(0, 2, 3)
W = 0.8 * orthogonal(3)


def total(W: Tensor) -> Tensor:
    z = fixed_point(tanh_map, torch.zeros(2, 3).double(), W, X, stopping=TIGHT, adjoint=Implicit(stopping=TIGHT)).z
    return (z * torch.arange(6).reshape(2, 3)).sum()


def second_differences(f: Callable[[Tensor], Tensor], a: Tensor, step: float = 1e-3) -> Tensor:
    """∂²f by central differences, with an error of order step²."""
    moves = step * torch.eye(a.numel(), dtype=a.dtype).reshape(-1, *a.shape)
    rows = [
        [f(a + u + v) - f(a + u - v) - f(a - u + v) + f(a - u - v) for v in moves]
        for u in moves
    ]  # fmt: skip
    return torch.tensor(rows, dtype=a.dtype).reshape(*a.shape, *a.shape) / (4 * step**2)


@pytest.mark.parametrize(
    ("outer", "inner"),
    [
        (torch.func.jacrev, torch.func.jacrev),
        (torch.func.jacfwd, torch.func.jacrev),
        (torch.func.jacrev, torch.func.jacfwd),
    ],
    ids=["reverse-reverse", "forward-reverse", "reverse-forward"],
)
def test_second_derivatives(outer: Any, inner: Any) -> None:
    assert torch.allclose(outer(inner(total))(W), second_differences(total, W), rtol=1e-4, atol=1e-4)


def test_forward_modes_do_not_nest() -> None:
    """PyTorch loses the outer tangents of an autograd.Function there; an error must say so."""
    with pytest.raises(NotImplementedError, match=r"forward mode inside forward mode.*torch.func.hessian"):
        torch.func.jacfwd(torch.func.jacfwd(total))(W)
