"""Monotone operator equilibrium networks: one fixed point, for any parameters."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from equilibria.adjoints import Adjoint
from equilibria.nn.deq import DEQ, Block
from equilibria.nn.pickling import make_picklable
from equilibria.solvers import PeacemanRachford
from equilibria.stopping import Stopping

M = TypeVar("M", bound=nn.Module)


def monotone(module: M, name: str = "weight", margin: float = 0.1) -> M:
    """W = (1 - m) I - AᵀA + B - Bᵀ: then I - W is monotone, with (I - W) + (I - W)ᵀ >= 2 m I, whatever A and B are.

    With m = margin > 0, z = relu(W z + c) has exactly one solution for every c, although W may be as large as it likes,
    and ‖∂z / ∂c‖₂ <= 1 / m. The same holds for every nonlinearity with slopes in [0, 1] that acts on each feature alone
    (tanh, sigmoid, softplus). Every W of that kind is made by some A and B.

    The parametrisation starts from the W of that kind that is nearest to the present weight in the Frobenius norm; a
    weight that is assigned later (`module.weight = W`) is replaced by the nearest as well. The parameters A and B are
    `parametrizations.weight.original0` and `original1`, (D, D) each.

    Args:
        module: owner of the weight, changed in place; for instance nn.Linear(D, D).
        name: of a parameter of shape (D, D).
        margin: m, 0 < m < 1 as a rule; larger is better conditioned and less expressive.

    Raises:
        ValueError: margin is not a finite number above 0, or the module has no such square tensor.

    Source: Winston and Kolter 2020, "Monotone operator equilibrium networks", section 3.2; the bound on the gradient is
    that of Pabbaraju, Winston and Kolter 2021, "Estimating Lipschitz constants of monotone deep equilibrium models".

    >>> linear = monotone(nn.Linear(8, 8), margin=0.5)
    >>> bool(torch.linalg.eigvalsh(linear.weight + linear.weight.T).max() <= 1.0001)
    True
    """
    weight = getattr(module, name, None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or weight.shape[0] != weight.shape[1]:
        found = f"one of shape {tuple(weight.shape)}" if isinstance(weight, Tensor) else "none"
        raise ValueError(f"{type(module).__name__}.{name} must be a tensor of shape (D, D); there is {found}")
    register_parametrization(module, name, Monotone(margin))
    make_picklable(module)
    return module


class Monotone(nn.Module):
    """(A, B) -> (1 - m) I - AᵀA + B - Bᵀ, for `monotone`."""

    def __init__(self, margin: float) -> None:
        super().__init__()
        if not 0.0 < margin < float("inf"):
            raise ValueError(f"margin is {margin}; it must be a finite number above 0, such as 0.1")
        self.margin = margin

    def forward(self, A: Tensor, B: Tensor) -> Tensor:
        identity = torch.eye(len(A), dtype=A.dtype, device=A.device)
        with torch.autocast(A.device.type, enabled=False):  # rounding AᵀA could make it indefinite
            return (1.0 - self.margin) * identity - A.mT @ A + B - B.mT

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """(A, B) of the nearest monotone weight: AᵀA is the positive part of (1 - m) I minus the symmetric part."""
        identity = torch.eye(len(weight), dtype=weight.dtype, device=weight.device)
        values, vectors = torch.linalg.eigh((1.0 - self.margin) * identity - (weight + weight.mT) / 2)
        return values.clamp(min=0.0).sqrt().unsqueeze(1) * vectors.mT, (weight - weight.mT) / 4

    def extra_repr(self) -> str:
        return f"margin={self.margin}"


class MonotoneBlock(nn.Module):
    """f(z, W, c) = relu(W z + c) with c = U x + b: a block whose equilibrium exists and is unique, for `MonotoneDEQ`.

    Args:
        input_size: of x (B, input_size).
        size: D, of z (B, D).
        margin: m of `monotone`.

    Source: Winston and Kolter 2020, section 3.

    >>> block = MonotoneBlock(3, 8)
    >>> W, c = block.prepare(torch.ones(2, 3))
    >>> block(torch.zeros(2, 8), W, c).shape
    torch.Size([2, 8])
    """

    batch_dims: tuple[int | None, ...] = (None, 0)

    def __init__(self, input_size: int, size: int, margin: float = 0.1) -> None:
        super().__init__()
        self.inner = monotone(nn.Linear(size, size, bias=False), margin=margin)
        self.outer = nn.Linear(input_size, size)

    def prepare(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.inner.weight, self.outer(x)

    def initial(self, x: Tensor) -> Tensor:
        return x.new_zeros(len(x), self.outer.out_features)

    def forward(self, z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        with torch.autocast(z.device.type, enabled=False):  # with the very weight that the solver was given
            return torch.relu(F.linear(z, weight) + bias)


class MonotoneDEQ(DEQ[Block]):
    """A DEQ whose block is f(z, W, c) = relu(W z + c), solved by Peaceman-Rachford splitting.

    Args:
        block: `prepare(*inputs)` returns (W, c), W (D, D) with I - W monotone and c (B, D), such as `MonotoneBlock`.
        alpha: step size of `PeacemanRachford`; any value above 0 converges.
        stopping, adjoint, eval_stopping, raise_nonfinite: as in `DEQ`. For another solver use `DEQ` itself, with the same
            block.

    torch.vmap over inputs is refused, as the splitting needs c beforehand.

    >>> deq = MonotoneDEQ(MonotoneBlock(3, 8))
    >>> z, stats = deq(torch.randn(2, 3))
    >>> bool(stats.converged.all())
    True
    """

    def __init__(
        self,
        block: Block,
        *,
        alpha: float = 1.0,
        stopping: Stopping | None = None,
        adjoint: Adjoint | None = None,
        eval_stopping: Stopping | None = None,
        raise_nonfinite: bool = True,
    ) -> None:
        super().__init__(
            block, stopping=stopping, adjoint=adjoint, eval_stopping=eval_stopping, raise_nonfinite=raise_nonfinite
        )
        self.alpha = alpha

    def solver_for(self, *args: Any) -> PeacemanRachford:
        if len(args) != 2:
            raise TypeError(
                f"MonotoneDEQ needs a block whose prepare returns (W, c), for f(z, W, c) = relu(W z + c); that of "
                f"{type(self.block).__name__} returned {len(args)} args"
            )
        return PeacemanRachford(weight=args[0], bias=args[1], alpha=self.alpha)
