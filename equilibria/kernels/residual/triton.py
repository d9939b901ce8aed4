"""The same in Triton: f(z) and z are read once. The order of every sum is fixed, whatever the batch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from equilibria.kernels.launch import launch, pieces, power_of_two
from equilibria.kernels.residual.reference import Residual

CHUNK, BLOCK = 8192, 1024


def residual(fz: Tensor, z: Tensor) -> Residual:
    batch, size = z.shape
    chunk = min(CHUNK, power_of_two(size))
    chunks = pieces(size, chunk)
    g = torch.empty(batch, size, dtype=torch.promote_types(z.dtype, torch.float32), device=z.device)
    squares = g.new_empty(2, batch, chunks)
    launch(
        _residual, (batch, chunks), fz, z, g, squares, size, *fz.stride(), *z.stride(), *g.stride(), *squares.stride(),
        BLOCK=min(BLOCK, chunk), CHUNK=chunk,
    )  # fmt: skip
    norm, scale = squares.sum(dim=2).sqrt().unbind(0)
    return Residual(g, norm, scale)


@triton.jit
def _residual(
    fz, z, g, squares, size, fz_b, fz_d, z_b, z_d, g_b, g_d, squares_of, squares_b, squares_c,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    sample, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    norm = tl.zeros((BLOCK,), dtype=g.dtype.element_ty)
    scale = tl.zeros((BLOCK,), dtype=g.dtype.element_ty)
    for start in range(0, CHUNK, BLOCK):
        d = chunk * CHUNK + start + tl.arange(0, BLOCK)
        inside = d < size
        after = tl.load(fz + sample * fz_b + d * fz_d, mask=inside, other=0.0).to(g.dtype.element_ty)
        before = tl.load(z + sample * z_b + d * z_d, mask=inside, other=0.0).to(g.dtype.element_ty)
        change = after - before
        tl.store(g + sample * g_b + d * g_d, change, mask=inside)
        norm += change * change
        scale += after * after
    place = squares + sample * squares_b + chunk * squares_c
    tl.store(place, tl.sum(norm, axis=0))
    tl.store(place + squares_of, tl.sum(scale, axis=0))
