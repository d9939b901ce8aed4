"""The default solver on maps that plain iteration does not solve: every sample, within a stated number of evaluations.

The bounds are what was measured, and a little (at most a tenth) for other machines' rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import normal, orthogonal, tanh_map
from torch import Tensor, nn

from equilibria import Broyden, Picard, Stopping, fixed_point
from equilibria.models import DEQTransformerLM, TransformerConfig
from equilibria.models.block import TransformerBlock
from equilibria.solution import Stats
from equilibria.solvers import Solver


def solve(f: Callable[..., Tensor], z0: Tensor, *args: Any, rtol: float, solver: Solver[Any] | None = None) -> Stats:
    return fixed_point(f, z0, *args, solver=solver, stopping=Stopping(rtol=rtol, max_evals=300)).stats


def rotation(size: int, scale: float, dtype: torch.dtype, batch: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    """(z0, W, x) of z = tanh(W z + x), W orthogonal times `scale`."""
    W, x = scale * orthogonal(size), normal(1, batch, size)
    return torch.zeros(batch, size, dtype=dtype), W.to(dtype), x.to(dtype)


def block(std: float | None, batch: int = 8, length: int = 32) -> tuple[Callable[..., Tensor], Tensor, tuple[Any, ...]]:
    """A post-norm Transformer block with weights of deviation `std`, or as nn.Linear draws them; injection N(0, 1)."""
    torch.manual_seed(0)
    made = TransformerBlock(d_model=64, n_head=4, d_inner=256, init_std=std or 0.02)
    if std is None:
        for linear in made.modules():
            if isinstance(linear, nn.Linear):
                linear.reset_parameters()
    u = torch.randn(batch, length, 3 * 64)
    with torch.no_grad():
        return made, made.initial(u), made.prepare(u)


class TestRotations:
    """z = tanh(W z + x) with all singular values of W above 1."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize(
        ("size", "rtol", "bound"), [(64, 1e-3, 30), (64, 1e-6, 55), (1024, 1e-3, 25), (1024, 1e-6, 50)]
    )
    def test_converges(self, size: int, rtol: float, bound: int, dtype: torch.dtype) -> None:
        stats = solve(tanh_map, *rotation(size, 1.2, dtype), rtol=rtol)
        assert stats.converged.all()
        assert stats.evaluations <= bound

    def test_converges_where_expansion_is_strong(self) -> None:
        z0, W, x = rotation(64, 1.5, torch.float64)
        stats = solve(tanh_map, z0, W, x, rtol=1e-6)
        assert stats.converged.all()
        assert stats.evaluations <= 78
        assert not solve(tanh_map, z0, W, x, rtol=1e-6, solver=Picard()).converged.all()


class TestContractions:
    """Where plain iteration is good, nothing is lost: W random with spectral norm 0.9."""

    @pytest.mark.parametrize("batch", [1, 32])
    @pytest.mark.parametrize("size", [64, 1024])
    @pytest.mark.parametrize("rtol", [1e-3, 1e-6])
    def test_needs_no_more_than_picard(self, size: int, batch: int, rtol: float) -> None:
        W = normal(0, size, size)
        W, x = (0.9 * W / torch.linalg.matrix_norm(W, 2)).float(), normal(1, batch, size).float()
        default, picard = (solve(tanh_map, 0 * x, W, x, rtol=rtol, solver=s) for s in (None, Picard()))
        assert default.converged.all()
        assert default.evaluations <= picard.evaluations <= 21


class TestTransformerBlocks:
    """The identity in f makes I - J small, the norm makes it far from linear."""

    @pytest.mark.parametrize(
        ("std", "rtol", "bound"),
        [(0.02, 1e-3, 32), (0.02, 1e-6, 100), (None, 1e-3, 38), (None, 1e-6, 74), (0.05, 1e-3, 99)],
    )
    def test_converges(self, std: float | None, rtol: float, bound: int) -> None:
        f, z0, args = block(std)
        with torch.no_grad():
            stats = solve(f, z0, *args, rtol=rtol)
        assert stats.converged.all()
        assert stats.evaluations <= bound

    @pytest.mark.parametrize("std", [0.02, None, 0.05])
    def test_converges_with_nothing_said(self, std: float | None) -> None:
        f, z0, args = block(std)
        with torch.no_grad():
            stats = fixed_point(f, z0, *args).stats
        assert stats.converged.all()

    @pytest.mark.parametrize("std", [0.02, None])
    def test_beats_plain_iteration_and_broyden(self, std: float | None) -> None:
        f, z0, args = block(std)
        with torch.no_grad():
            default, *others = (solve(f, z0, *args, rtol=1e-3, solver=s) for s in (None, Picard(), Broyden(history=20)))
        assert all(default.evaluations < other.evaluations for other in others)


@pytest.mark.parametrize("seed", [1, 3, 8])
def test_a_solve_that_does_not_converge_stays_finite(seed: int) -> None:
    """Blocks fresh from initialisation, with small injections: steps of type 1 are carried off now and then."""
    torch.manual_seed(seed)
    model = DEQTransformerLM(TransformerConfig(vocab_size=11, d_model=16, n_head=2, d_inner=32, subseq_len=3))
    tokens = torch.randint(11, (2, 7))
    with torch.no_grad():
        output = model(tokens, tokens)
    assert output.nll.isfinite().all()
    assert all(float(stats.relative.max()) < 0.1 for stats in output.stats)
