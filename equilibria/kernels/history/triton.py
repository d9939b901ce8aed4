"""The same in Triton: each element of the history is read once, and nothing but the result is written.

A sample's row of D elements is cut into chunks of a fixed size, one program each; their sums (vectors, B, chunks, m) are
added up at the end. No atomic addition, and no cut that depends on the batch: the order of every sum is fixed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from equilibria.kernels.launch import launch, pieces, power_of_two

CHUNK = 4096
"""Elements of D that one program reads: long rows fill a GPU also where the batch is small."""
TILE = 8192
"""Elements of the history that a program holds at once."""


def dots(history: Tensor, v: Tensor) -> Tensor:
    return _products(history, history.shape[1], v)[0]


def both_dots(history: Tensor, v: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    of_v, of_w = _products(history, history.shape[1], v, w=w)
    return of_v, of_w


def store_dots(history: Tensor, age: int, new: Tensor, old: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    slots = history.shape[1]
    of_v, of_pair = _products(history, min(age + 1, slots), v, store=(age % slots, new, old))
    return history, of_v, of_pair


def combine(base: Tensor, weights: Tensor, history: Tensor) -> Tensor:
    batch, used, size = history.shape
    out = torch.empty_like(base, memory_format=torch.contiguous_format)
    rows = power_of_two(used)
    block = _block(rows, size)
    launch(
        _combine, (batch, pieces(size, block)), base, weights, history, out, size, used,
        *base.stride(), *weights.stride(), *history.stride(), *out.stride(),
        ROWS=rows, BLOCK=block,
    )  # fmt: skip
    return out


def _products(
    history: Tensor, used: int, v: Tensor, *, w: Tensor | None = None, store: tuple[int, Tensor, Tensor] | None = None
) -> tuple[Tensor, ...]:
    """The products of v, and of w or of the pair that is stored, if there is one."""
    batch, _, size = history.shape
    rows = power_of_two(used)
    chunk = min(CHUNK, power_of_two(size))
    chunks = pieces(size, chunk)
    vectors = 1 if w is None and store is None else 2
    sums = v.new_empty(vectors, batch, chunks, used)
    slot, new, old = store or (0, v if w is None else w, v)
    launch(
        _dots, (batch, chunks), history, v, new, old, sums, size, used, slot,
        *history.stride(), *v.stride(), *new.stride(), *old.stride(), *sums.stride(),
        ROWS=rows, BLOCK=_block(rows, size), CHUNK=chunk, BOTH=vectors == 2, STORE=store is not None,
    )  # fmt: skip
    return (sums[:, :, 0] if chunks == 1 else sums.sum(dim=2)).unbind(0)


def _block(rows: int, size: int) -> int:
    return min(max(TILE // rows, 64), 1024, power_of_two(size))


@triton.jit
def _dots(
    history, v, new, old, sums, size, used, slot,
    history_b, history_m, history_d, v_b, v_d, new_b, new_d, old_b, old_d, sums_v, sums_b, sums_c, sums_m,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, BOTH: tl.constexpr, STORE: tl.constexpr,
):  # fmt: skip
    """The products of one chunk of v with the same chunk of the rows in use.

    With BOTH, those of `new` as well; with STORE, first put new - old in a slot, and take its products instead of those of
    `new`.
    """
    sample, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    row = tl.arange(0, ROWS)
    of_v = tl.zeros((ROWS,), dtype=sums.dtype.element_ty)
    of_w = tl.zeros((ROWS,), dtype=sums.dtype.element_ty)
    for start in range(0, CHUNK, BLOCK):
        d = chunk * CHUNK + start + tl.arange(0, BLOCK)
        inside = d < size
        x = tl.load(v + sample * v_b + d * v_d, mask=inside, other=0.0)
        place = history + sample * history_b + row[:, None] * history_m.to(tl.int64) + d[None, :] * history_d
        known = (row[:, None] < used) & inside[None, :]
        if STORE:
            # The new row is taken from registers: other threads may not see yet what was written.
            known = known & (row[:, None] != slot)
        tile = tl.load(place, mask=known, other=0.0)
        if BOTH:
            w = tl.load(new + sample * new_b + d * new_d, mask=inside, other=0.0).to(sums.dtype.element_ty)
        if STORE:
            before = tl.load(old + sample * old_b + d * old_d, mask=inside, other=0.0).to(sums.dtype.element_ty)
            stored = (w - before).to(history.dtype.element_ty)
            tl.store(history + sample * history_b + slot * history_m.to(tl.int64) + d * history_d, stored, mask=inside)
            tile = tl.where(row[:, None] == slot, stored[None, :], tile)
            w = stored.to(sums.dtype.element_ty)
        tile = tile.to(sums.dtype.element_ty)
        of_v += tl.sum(tile * x[None, :], axis=1)
        if BOTH:
            of_w += tl.sum(tile * w[None, :], axis=1)
    place = sums + sample * sums_b + chunk * sums_c + row * sums_m
    tl.store(place, of_v, mask=row < used)
    if BOTH:
        tl.store(place + sums_v, of_w, mask=row < used)


@triton.jit
def _combine(
    base, weights, history, out, size, used,
    base_b, base_d, weights_b, weights_m, history_b, history_m, history_d, out_b, out_d,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """base - Σ weights history, for BLOCK elements of one sample."""
    sample, block = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    row = tl.arange(0, ROWS)
    d = block * BLOCK + tl.arange(0, BLOCK)
    inside = d < size
    weight = tl.load(weights + sample * weights_b + row * weights_m, mask=row < used, other=0.0)
    place = history + sample * history_b + row[:, None] * history_m.to(tl.int64) + d[None, :] * history_d
    tile = tl.load(place, mask=(row[:, None] < used) & inside[None, :], other=0.0).to(weight.dtype)
    start = tl.load(base + sample * base_b + d * base_d, mask=inside, other=0.0).to(weight.dtype)
    total = start - tl.sum(tile * weight[:, None], axis=0)
    tl.store(out + sample * out_b + d * out_d, total.to(out.dtype.element_ty), mask=inside)
