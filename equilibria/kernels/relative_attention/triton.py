"""The same in Triton. One program owns a tile of queries (or keys, or distances) of one head of one sample.

Scores exist only as tiles in registers. The position term of a tile needs a band of 2 BLOCK columns of the positions: one
matrix product with the band, of which each row is then read one column further left than the row above it (`tl.gather`).
The backward pass computes the scores again: once per tile of queries, of keys and, where asked for, of distances.
"""

# pyright: reportGeneralTypeIssues=false
# (what a kernel calls is compiled by Triton; to the type checker it never returns)
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from equilibria.kernels.launch import launch, pieces, power_of_two

Inputs = Sequence[Tensor | None]


def forward(*inputs: Tensor | None) -> tuple[Tensor, Tensor]:
    """The output (H, B, L, e) and the log of each query's sum of exp(score), (H, B, L)."""
    tensors, sizes, tiles = _arguments(inputs)
    query = tensors[0]
    output = torch.empty_like(query)
    total = query.new_empty(query.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32))
    _launch(_forward, sizes[2], (*tensors, output, total), sizes, tiles)
    return output, total


def backward(
    wanted: Sequence[bool], inputs: Inputs, output: Tensor, total: Tensor, grad: Tensor
) -> tuple[Tensor | None, ...]:
    """The gradients of the first five inputs, None for those not wanted."""
    tensors, sizes, tiles = _arguments(inputs)
    query, _, keys, _, positions = tensors[:5]
    heads, batch, length, columns, _ = sizes
    grad = grad.to(query.dtype).contiguous()
    # Σ over keys of weight times its gradient, which the derivative of softmax takes off.
    mean = (grad.to(total.dtype) * output.to(total.dtype)).sum(dim=3)
    tensors = (*tensors, grad, total, mean)
    found: list[Tensor | None] = [None] * 5
    if wanted[0] or wanted[1]:
        found[0], found[1] = torch.empty_like(query), torch.empty_like(query)
        _launch(_backward_queries, length, (*tensors, found[0], found[1]), sizes, tiles)
    if wanted[2] or wanted[3]:
        found[2], found[3] = torch.empty_like(keys), torch.empty_like(keys)
        _launch(_backward_keys, columns, (*tensors, found[2], found[3]), sizes, tiles)
    if wanted[4]:
        parts = total.new_empty(heads, batch, *positions.shape[1:])  # one for each sample: no atomic addition
        _launch(_backward_positions, columns + 1, (*tensors, parts), sizes, tiles)
        found[4] = parts.sum(dim=1).to(positions.dtype).mT
    return tuple(t if want else None for t, want in zip(found, wanted[:5], strict=True))


def _arguments(inputs: Inputs) -> tuple[tuple[Tensor, ...], tuple[int, ...], dict[str, Any]]:
    """The inputs in order of memory (any tensor for no mask), the sizes (H, B, L, K, e), and what is compiled in."""
    mask, dropout_mask = inputs[5:]
    *tensors, positions = (t for t in inputs[:5] if t is not None)
    tensors = [t.contiguous() for t in (*tensors, positions.mT)]  # positions (K + 1, e) are read like keys
    query = tensors[0]
    heads, batch, length, width = query.shape
    width_of_tile = max(16, power_of_two(width))
    tiles = {
        "MASK": 0 if mask is None else mask.dim() - 1,
        "DROP": dropout_mask is not None,
        "WIDTH": width_of_tile,
        # Of float32 the tensor cores take three parts; their products add up to float32 again.
        "PRECISION": "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3",
        # The largest with which no kernel runs out of registers or of 70 KB of shared memory, compiled for sm_80 and sm_90.
        "BLOCK": 32 if query.element_size() == 2 else 16,
        "num_warps": 4 if width_of_tile <= 64 else 8,
        "num_stages": 2,
    }
    masks = (query if m is None else m.contiguous() for m in (mask, dropout_mask))
    return (*tensors, *masks), (heads, batch, length, tensors[2].shape[2], width), tiles


def _launch(kernel: Any, rows: int, tensors: Sequence[Tensor], sizes: tuple[int, ...], tiles: dict[str, Any]) -> None:
    """One program for each tile of rows of each head of each sample."""
    heads, batch, *_ = sizes
    launch(kernel, (pieces(rows, tiles["BLOCK"]), heads * batch), *tensors, *sizes, **tiles)


@triton.jit
def _parts(pair, positions, dropout_mask, heads, batch, length, columns, width):
    """Of pair head · B + sample: the sample, the positions of its head, and its dropout mask."""
    head, sample = pair // batch, pair % batch
    return sample, positions + head * width * (columns + 1), dropout_mask + (sample * heads + head) * length * columns


@triton.jit
def _queries(content_query, position_query, grad, total, mean, pair, row, length, width, WIDTH: tl.constexpr):
    """What the backward pass needs of the queries in rows (n,) of a pair."""
    start = pair * length * width
    content = _rows(content_query + start, row, length, width, WIDTH)
    position = _rows(position_query + start, row, length, width, WIDTH)
    upper = _rows(grad + start, row, length, width, WIDTH)
    row_total = tl.load(total + pair * length + row, mask=row < length, other=0.0)
    row_mean = tl.load(mean + pair * length + row, mask=row < length, other=0.0)
    return content, position, upper, row_total, row_mean


@triton.jit
def _rows(matrix, row, rows, width, WIDTH: tl.constexpr):
    """(n, WIDTH) rows (n,) of a matrix (rows, width), 0 outside of it."""
    e = tl.arange(0, WIDTH)
    inside = (row[:, None] >= 0) & (row[:, None] < rows) & (e[None, :] < width)
    return tl.load(matrix + row[:, None] * width + e[None, :], mask=inside, other=0.0)


@triton.jit
def _put(matrix, value, row, rows, width, WIDTH: tl.constexpr):
    e = tl.arange(0, WIDTH)
    inside = (row[:, None] < rows) & (e[None, :] < width)
    tl.store(matrix + row[:, None] * width + e[None, :], value.to(matrix.dtype.element_ty), mask=inside)


@triton.jit
def _hide(scores, i, j, mask, sample, length, columns, MASK: tl.constexpr):
    """The scores of queries i and keys j (both of the shape of the tile), -inf where a key is not seen."""
    seen = (i < length) & (j >= 0) & (j <= i + columns - length)
    if MASK:
        # As `relative_shift` reads it: rows of K from entry L on.
        place = mask + length + i * columns + j
        if MASK == 2:
            place += sample * length * (columns + 1)
        scores += tl.load(place, mask=seen, other=0.0).to(scores.dtype)
    return tl.where(seen, scores, float("-inf"))


@triton.jit
def _dropped(tile, i, j, dropout_mask, length, columns, DROP: tl.constexpr):
    """The tile times its part of the dropout mask (L, K) of one head of one sample."""
    if DROP:
        inside = (i < length) & (j >= 0) & (j < columns)
        tile = tile * tl.load(dropout_mask + i * columns + j, mask=inside, other=0.0).to(tile.dtype)
    return tile


@triton.jit
def _scores(
    content_query, position_query, key, positions, start_i, start_j, length, columns, width,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(BLOCK, BLOCK) content and position terms of queries start_i.. and keys start_j.., and the band of positions used."""
    m, n = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    scores = tl.dot(content_query, tl.trans(key), input_precision=PRECISION)
    # Query i and key j meet at column L - i + j.
    c = length - start_i - (BLOCK - 1) + start_j + tl.arange(0, 2 * BLOCK)
    band = _rows(positions + width, c - 1, columns, width, WIDTH)  # without column 0: distance K does not occur
    product = tl.dot(position_query, tl.trans(band), input_precision=PRECISION)  # (BLOCK, 2 BLOCK)
    return scores + tl.gather(product, BLOCK - 1 - m + n, 1), band


@triton.jit
def _weights_gradient(
    scores, total, mean, grad_weights, i, j, dropout_mask, length, columns, DROP: tl.constexpr
):  # fmt: skip
    """The weights after dropout, and the gradient of the scores."""
    weights = tl.exp(scores - total[:, None])
    dropped = _dropped(weights, i, j, dropout_mask, length, columns, DROP)
    grad_weights = _dropped(grad_weights, i, j, dropout_mask, length, columns, DROP)
    return dropped, weights * (grad_weights - mean[:, None])


@triton.jit
def _scores_gradient(
    content, position, key, value, positions, upper, total, mean, mask, dropout_mask,
    sample, start_i, start_j, length, columns, width,
    MASK: tl.constexpr, DROP: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of a tile of queries and keys: the weights after dropout, the gradient of the scores, and the band of positions."""
    scores, band = _scores(
        content, position, key, positions, start_i, start_j, length, columns, width, BLOCK, WIDTH, PRECISION
    )
    i, j = (start_i + tl.arange(0, BLOCK))[:, None], (start_j + tl.arange(0, BLOCK))[None, :]
    scores = _hide(scores, i, j, mask, sample, length, columns, MASK)
    grad_weights = tl.dot(upper, tl.trans(value), input_precision=PRECISION)
    dropped, slope = _weights_gradient(scores, total, mean, grad_weights, i, j, dropout_mask, length, columns, DROP)
    return dropped, slope, band


@triton.jit
def _forward(
    content_query, position_query, keys, values, positions, mask, dropout_mask, output, total,
    heads, batch, length, columns, width,
    MASK: tl.constexpr, DROP: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(1).to(tl.int64)
    sample, positions, dropout_mask = _parts(pair, positions, dropout_mask, heads, batch, length, columns, width)
    queries, rows = pair * length * width, pair * columns * width
    start_i = tl.program_id(0) * BLOCK
    row = start_i + tl.arange(0, BLOCK)
    content = _rows(content_query + queries, row, length, width, WIDTH)
    position = _rows(position_query + queries, row, length, width, WIDTH)
    largest = tl.full((BLOCK,), float("-inf"), dtype=total.dtype.element_ty)
    weight = tl.zeros((BLOCK,), dtype=total.dtype.element_ty)
    attended = tl.zeros((BLOCK, WIDTH), dtype=total.dtype.element_ty)
    for start_j in range(0, tl.minimum(columns, columns - length + start_i + BLOCK), BLOCK):
        column = start_j + tl.arange(0, BLOCK)
        key = _rows(keys + rows, column, columns, width, WIDTH)
        value = _rows(values + rows, column, columns, width, WIDTH)
        scores, _ = _scores(
            content, position, key, positions, start_i, start_j, length, columns, width, BLOCK, WIDTH, PRECISION
        )
        i, j = row[:, None], column[None, :]
        scores = _hide(scores, i, j, mask, sample, length, columns, MASK)
        before, largest = largest, tl.maximum(largest, tl.max(scores, axis=1))
        finite = tl.where(largest == float("-inf"), 0.0, largest)  # where no key was seen yet
        shrink = tl.exp(before - finite)
        weights = tl.exp(scores - finite[:, None])
        weight = weight * shrink + tl.sum(weights, axis=1)
        weights = _dropped(weights, i, j, dropout_mask, length, columns, DROP)
        attended = attended * shrink[:, None] + tl.dot(weights.to(value.dtype), value, input_precision=PRECISION)
    weight = tl.where(row < length, weight, 1.0)
    _put(output + queries, attended / weight[:, None], row, length, width, WIDTH)
    tl.store(total + pair * length + row, largest + tl.log(weight), mask=row < length)


@triton.jit
def _backward_queries(
    content_query, position_query, keys, values, positions, mask, dropout_mask, grad, total, mean,
    grad_content, grad_position,
    heads, batch, length, columns, width,
    MASK: tl.constexpr, DROP: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(1).to(tl.int64)
    sample, positions, dropout_mask = _parts(pair, positions, dropout_mask, heads, batch, length, columns, width)
    queries, rows = pair * length * width, pair * columns * width
    start_i = tl.program_id(0) * BLOCK
    row = start_i + tl.arange(0, BLOCK)
    content, position, upper, row_total, row_mean = _queries(
        content_query, position_query, grad, total, mean, pair, row, length, width, WIDTH
    )
    sum_content = tl.zeros((BLOCK, WIDTH), dtype=total.dtype.element_ty)
    sum_position = tl.zeros((BLOCK, WIDTH), dtype=total.dtype.element_ty)
    for start_j in range(0, tl.minimum(columns, columns - length + start_i + BLOCK), BLOCK):
        column = start_j + tl.arange(0, BLOCK)
        key = _rows(keys + rows, column, columns, width, WIDTH)
        value = _rows(values + rows, column, columns, width, WIDTH)
        _, slope, band = _scores_gradient(
            content, position, key, value, positions, upper, row_total, row_mean, mask, dropout_mask,
            sample, start_i, start_j, length, columns, width, MASK, DROP, BLOCK, WIDTH, PRECISION,
        )  # fmt: skip
        slope = slope.to(key.dtype)
        sum_content += tl.dot(slope, key, input_precision=PRECISION)
        # Back to the columns of the band, from which `_scores` gathered them.
        n = tl.arange(0, 2 * BLOCK)[None, :] - (BLOCK - 1 - tl.arange(0, BLOCK)[:, None])
        spread = tl.gather(slope, tl.minimum(tl.maximum(n, 0), BLOCK - 1), 1)
        spread = tl.where((n >= 0) & (n < BLOCK), spread, 0.0).to(key.dtype)
        sum_position += tl.dot(spread, band, input_precision=PRECISION)
    _put(grad_content + queries, sum_content, row, length, width, WIDTH)
    _put(grad_position + queries, sum_position, row, length, width, WIDTH)


@triton.jit
def _backward_keys(
    content_query, position_query, keys, values, positions, mask, dropout_mask, grad, total, mean,
    grad_keys, grad_values,
    heads, batch, length, columns, width,
    MASK: tl.constexpr, DROP: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(1).to(tl.int64)
    sample, positions, dropout_mask = _parts(pair, positions, dropout_mask, heads, batch, length, columns, width)
    rows = pair * columns * width
    start_j = tl.program_id(0) * BLOCK
    column = start_j + tl.arange(0, BLOCK)
    key = _rows(keys + rows, column, columns, width, WIDTH)
    value = _rows(values + rows, column, columns, width, WIDTH)
    sum_keys = tl.zeros((BLOCK, WIDTH), dtype=total.dtype.element_ty)
    sum_values = tl.zeros((BLOCK, WIDTH), dtype=total.dtype.element_ty)
    first = tl.maximum(start_j - (columns - length), 0)  # the first query that sees one of these keys
    for start_i in range(first // BLOCK * BLOCK, length, BLOCK):
        row = start_i + tl.arange(0, BLOCK)
        content, position, upper, row_total, row_mean = _queries(
            content_query, position_query, grad, total, mean, pair, row, length, width, WIDTH
        )
        dropped, slope, _ = _scores_gradient(
            content, position, key, value, positions, upper, row_total, row_mean, mask, dropout_mask,
            sample, start_i, start_j, length, columns, width, MASK, DROP, BLOCK, WIDTH, PRECISION,
        )  # fmt: skip
        sum_keys += tl.dot(tl.trans(slope.to(content.dtype)), content, input_precision=PRECISION)
        sum_values += tl.dot(tl.trans(dropped.to(upper.dtype)), upper, input_precision=PRECISION)
    _put(grad_keys + rows, sum_keys, column, columns, width, WIDTH)
    _put(grad_values + rows, sum_values, column, columns, width, WIDTH)


@triton.jit
def _backward_positions(
    content_query, position_query, keys, values, positions, mask, dropout_mask, grad, total, mean, grad_positions,
    heads, batch, length, columns, width,
    MASK: tl.constexpr, DROP: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Tiles of queries and distances: here the keys are a band, and the content term is what has to be gathered."""
    pair = tl.program_id(1).to(tl.int64)
    sample, positions, dropout_mask = _parts(pair, positions, dropout_mask, heads, batch, length, columns, width)
    rows = pair * columns * width
    start_c = tl.program_id(0) * BLOCK
    m, n = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    distance = start_c + tl.arange(0, BLOCK)
    position_tile = _rows(positions + width, distance - 1, columns, width, WIDTH)
    sum_positions = tl.zeros((BLOCK, WIDTH), dtype=total.dtype.element_ty)
    first = tl.maximum(length - start_c - BLOCK + 1, 0)  # the first query with a key at one of these distances
    for start_i in range(first // BLOCK * BLOCK, length, BLOCK):
        row = start_i + tl.arange(0, BLOCK)
        content, position, upper, row_total, row_mean = _queries(
            content_query, position_query, grad, total, mean, pair, row, length, width, WIDTH
        )
        # Query i meets column c at key c - L + i.
        column = start_c - length + start_i + tl.arange(0, 2 * BLOCK)
        key = _rows(keys + rows, column, columns, width, WIDTH)
        value = _rows(values + rows, column, columns, width, WIDTH)
        product = tl.dot(content, tl.trans(key), input_precision=PRECISION)
        scores = tl.gather(product, m + n, 1) + tl.dot(position, tl.trans(position_tile), input_precision=PRECISION)
        i = row[:, None]
        j = start_c + n - length + i
        scores = _hide(scores, i, j, mask, sample, length, columns, MASK)
        grad_weights = tl.gather(tl.dot(upper, tl.trans(value), input_precision=PRECISION), m + n, 1)
        _, slope = _weights_gradient(scores, row_total, row_mean, grad_weights, i, j, dropout_mask, length, columns, DROP)
        sum_positions += tl.dot(tl.trans(slope.to(position.dtype)), position, input_precision=PRECISION)
    _put(grad_positions + pair * width * (columns + 1), sum_positions, distance, columns + 1, width, WIDTH)
