"""Weights made of other tensors: weight norm, bounded spectral norm, dropped connections.

Each helper registers a parametrisation with `torch.nn.utils.parametrize` and returns the module it was given. `DEQ` and
`stack` compute the weight once per solve (see `computed_once`), so that layers need not know. Initialise a weight before it
is parametrised: writing into it later writes into a derived tensor and is lost. Modules so made can be pickled.
"""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from equilibria.nn.dropout import FrozenDropout
from equilibria.nn.pickling import make_picklable
from equilibria.transforms import transformed, without_derivatives

M = TypeVar("M", bound=nn.Module)


def weight_norm(
    module: M, name: str = "weight", dim: int | None = 0, *, direction_drop: float = 0.0, keep_last_tap: bool = False
) -> M:
    """W = g V / ‖V‖: length g and direction V of each slice of a weight are parameters of their own.

    As `torch.nn.utils.parametrizations.weight_norm`, with the same parameters (`parametrizations.weight.original0` is g,
    `original1` is V, so that state dicts agree), but with right second derivatives on the CPU, where torch's fused
    operation has wrong ones, and with forward-mode derivatives, which it lacks.

    A slice of zeros stays zero (g = 0) and takes the direction (1, ..., 1), so that it can learn.

    With `direction_drop`, entries of V are dropped before the norm is taken, W = g (V ∘ M) / ‖V ∘ M‖, with the mask of
    `weight_drop`: each slice keeps its length g. `weight_drop` after weight norm drops entries of W instead.

    Args:
        module: owner of the weight, changed in place.
        name: of a parameter.
        dim: the dimension along which slices are taken, 0 for the rows of a linear map (one per unit); None normalises
            the weight as a whole.
        direction_drop: probability that an entry of V is zeroed in training mode, 0 <= p < 1. A slice of which nothing
            is left is zero.
        keep_last_tap: as of `weight_drop`.

    Raises:
        ValueError: the module has no such tensor, or the tensor no such dimension; direction_drop is outside [0, 1).

    Sources: Salimans & Kingma, "Weight Normalization", 2016, section 2; Bai, Kolter & Koltun, "Deep Equilibrium Models",
    2019, appendix, for its use in equilibrium models.

    >>> linear = weight_norm(nn.Linear(3, 2))
    >>> linear.parametrizations.weight.original0.shape
    torch.Size([2, 1])
    """
    weight = _tensor(module, name)
    if dim is not None and not -weight.dim() <= dim < weight.dim():
        raise ValueError(f"dim is {dim}, but {name} has shape {tuple(weight.shape)}; give one of its dimensions, or None")
    drop = DropConnect(direction_drop, keep_last_tap) if direction_drop else None
    return _register(module, name, WeightNorm(weight.dim(), dim, drop), unsafe=drop is not None)


def spectral_norm(
    module: M, name: str = "weight", bound: float = 1.0, *, n_power_iterations: int | None = 5, rescale: bool = False
) -> M:
    """W min(1, bound / σ), with σ = ‖W‖₂ the largest singular value: the map x -> W x stretches by `bound` at most.

    With the bound below 1, tanh(W z + U x) is a contraction: one fixed point, which Picard's iteration reaches at that
    rate. A convolution's kernel is taken as the matrix (out, in · size), whose norm is not that of the convolution.

    σ is estimated by power iteration: `n_power_iterations` in each training solve, starting from where the last solve
    ended, and 50 at the start. It is underestimated, by a relative error of at most r^(4k + 2) tan²θ after k iterations
    from an angle θ to the singular vector, where r is the ratio of the second singular value to the first; the norm
    exceeds the bound by as much. Training that presses the norm against its bound makes singular values equal and r = 1:
    there the error may be ten percent and more. Where the bound must hold, `n_power_iterations=None` computes σ by a
    singular value decomposition, to rounding.

    Gradients are those of the estimate, its starting vector being constant. In evaluation mode and under torch.func
    transforms the starting vector is not advanced.

    Args:
        module: owner of the weight, changed in place.
        name: of a parameter with two dimensions at least.
        bound: above 0, on the spectral norm.
        n_power_iterations: at least 1, each for two products of W with a vector, once per solve; or None, for a singular
            value decomposition.
        rescale: W bound / σ instead, of norm `bound` even where that of W is smaller.

    Raises:
        ValueError: an option is out of range, the module has no such tensor, or the tensor has too few dimensions.

    Sources: Miyato et al., "Spectral Normalization for Generative Adversarial Networks", 2018, section 2.1 (`rescale`);
    Gouk et al., "Regularisation of Neural Networks by Enforcing Lipschitz Continuity", 2021 (the bound).

    >>> linear = spectral_norm(nn.Linear(8, 8), bound=0.5)
    >>> bool(torch.linalg.matrix_norm(linear.weight, 2) < 0.51)
    True
    """
    if not 0.0 < bound < float("inf"):
        raise ValueError(f"bound is {bound}; a bound on the norm must be above 0 and finite")
    if n_power_iterations is not None and n_power_iterations < 1:
        raise ValueError(f"n_power_iterations is {n_power_iterations}; give 1 or more, or None for the exact norm")
    weight = _tensor(module, name)
    if weight.dim() < 2:
        raise ValueError(f"{name} has shape {tuple(weight.shape)}; a spectral norm needs a matrix")
    if rescale and not weight.any():
        raise ValueError(f"{name} is zero and cannot be rescaled to norm {bound}; initialise it first, or rescale=False")
    return _register(module, name, SpectralNorm(weight, bound, n_power_iterations, rescale))


def weight_drop(module: M, name: str = "weight", p: float = 0.5, *, keep_last_tap: bool = False) -> M:
    """W ∘ M, with entries of M zero with probability p, else 1 / (1 - p): connections are dropped instead of units.

    The mask is drawn when the weight is computed: in training mode once per solve of a `DEQ`, for all samples, and kept
    through its backward pass; in evaluation mode nothing is dropped. Its expectation is W. Register it after weight norm
    to drop entries of the normalised weight; a bound by `spectral_norm` holds for a dropped weight if it comes after.

    Args:
        module: owner of the weight, changed in place.
        name: of a parameter, for instance "weight_hh" of an nn.GRUCell.
        p: probability that an entry is zeroed, 0 <= p < 1.
        keep_last_tap: of the weight of a convolution over time, (out, in, taps) with several taps, drop nothing of the
            last, which looks at the present. Without effect on other weights. So did the TrellisNet code of 2019.

    Raises:
        ValueError: p is outside [0, 1), or the module has no such tensor.

    Sources: Wan et al., "Regularization of Neural Networks using DropConnect", 2013; Merity, Keskar & Socher,
    "Regularizing and Optimizing LSTM Language Models", 2018, section 2 (one mask for all steps of a recurrence).

    >>> linear = weight_drop(nn.Linear(50, 50, bias=False), p=0.5)
    >>> 0.4 < float((linear.weight == 0).float().mean()) < 0.6
    True
    """
    _tensor(module, name)
    return _register(module, name, DropConnect(p, keep_last_tap), unsafe=True)


class WeightNorm(nn.Module):
    """(g, V) -> g V / ‖V‖, for `weight_norm`; of a V with dropped entries, if `drop` is given."""

    def __init__(self, dims: int, dim: int | None, drop: DropConnect | None) -> None:
        super().__init__()
        self.dims = tuple(i for i in range(dims) if dim is None or i != dim % dims)
        self.drop = drop

    def forward(self, g: Tensor, v: Tensor) -> Tensor:
        if self.drop is None:
            return v * (g / self._norm(v))
        v = self.drop(v)
        norm = self._norm(v)
        return v * (g / torch.where(norm == 0, torch.ones_like(norm), norm))  # all of a slice may be dropped

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        norm = self._norm(weight)
        return norm, torch.where(norm == 0, torch.ones_like(weight), weight)

    def _norm(self, v: Tensor) -> Tensor:
        return torch.linalg.vector_norm(v, dim=self.dims, keepdim=True) if self.dims else v.abs()

    def extra_repr(self) -> str:
        return f"dims={self.dims}"


class SpectralNorm(nn.Module):
    """W -> W min(1, bound / σ), for `spectral_norm`."""

    u: Tensor | None
    """(out,) what the next power iteration starts from, near the left singular vector; None if σ is computed exactly."""

    def __init__(self, weight: Tensor, bound: float, n_power_iterations: int | None, rescale: bool) -> None:
        super().__init__()
        self.bound, self.n_power_iterations, self.rescale = bound, n_power_iterations, rescale
        u = None
        if n_power_iterations is not None:
            matrix = _matrix(weight.detach())
            u = _iterate(matrix, F.normalize(torch.randn_like(matrix[:, 0]), dim=0), 50)
        self.register_buffer("u", u)

    def forward(self, weight: Tensor) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):
            sigma = self._norm(_matrix(weight))
            scale = self.bound / (sigma if self.rescale else sigma.clamp_min(self.bound))
        return weight * scale.to(weight.dtype)

    def _norm(self, matrix: Tensor) -> Tensor:
        if self.u is None or self.n_power_iterations is None:
            return torch.linalg.matrix_norm(matrix, 2)
        u = self.u.to(matrix.dtype, copy=True)  # autograd keeps it, and the next training solve writes to the buffer
        if self.training:
            u = _iterate(without_derivatives(matrix), u, self.n_power_iterations)
            if not transformed():
                self.u.copy_(u)
        return torch.linalg.vector_norm(matrix @ F.normalize(matrix.mT @ u, dim=0))

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight

    def extra_repr(self) -> str:
        return f"bound={self.bound}, n_power_iterations={self.n_power_iterations}, rescale={self.rescale}"


class DropConnect(nn.Module):
    """W -> W ∘ M, for `weight_drop`. The mask, of the shape of W, is drawn by `drop`."""

    def __init__(self, p: float, keep_last_tap: bool) -> None:
        super().__init__()
        self.drop = FrozenDropout(p)
        self.keep_last_tap = keep_last_tap

    def forward(self, weight: Tensor) -> Tensor:
        mask = self.drop.mask(weight)
        if mask is not None and self.keep_last_tap and weight.dim() == 3 and weight.shape[-1] > 1:
            mask = torch.cat([mask[..., :-1], torch.ones_like(mask[..., -1:])], -1)
        return self.drop(weight, mask)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight


def _iterate(matrix: Tensor, u: Tensor, steps: int) -> Tensor:
    """u towards the left singular vector of the largest singular value."""
    for _ in range(steps):
        following = F.normalize(matrix @ F.normalize(matrix.mT @ u, dim=0), dim=0)
        u = torch.where(following.any(), following, u)  # a weight of zeros has no direction, and may grow one
    return u


def _matrix(weight: Tensor) -> Tensor:
    """(out, rest), in float32 at least."""
    return weight.flatten(1).to(torch.promote_types(weight.dtype, torch.float32))


def _register(module: M, name: str, parametrization: nn.Module, *, unsafe: bool = False) -> M:
    # `unsafe` skips torch's check of shapes and dtypes, which would draw random numbers where entries are dropped.
    register_parametrization(module, name, parametrization, unsafe=unsafe)
    make_picklable(module)
    return module


def _tensor(module: nn.Module, name: str) -> Tensor:
    tensor = getattr(module, name, None)
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{type(module).__name__} has no tensor `{name}`; give the name of one of its parameters")
    return tensor
