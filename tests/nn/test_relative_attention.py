import math
from collections.abc import Sequence

import pytest
import torch
from recorded import TOLERANCES, read, same
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from equilibria.nn.relative_attention import (
    relative_attention,
    relative_mask,
    relative_shift,
    sinusoidal_positions,
)

F64 = torch.float64
SIZES = [(4, 0, None), (4, 3, None), (1, 5, None), (5, 2, 3), (3, 6, 1), (1, 6, 4), (1, 0, None)]  # L, M, window


def by_loops(args: Sequence[Tensor], memory: int, window: int | None) -> Tensor:
    """Attention as it is defined; r (H, e, K + 1) has the distances K, ..., 0."""
    q, p, k, v, r = args
    heads, batch, length, _ = q.shape
    columns = k.shape[2]
    out = torch.zeros_like(q)
    for h in range(heads):
        for b in range(batch):
            for i in range(length):
                seen, scores = [], []
                for j in range(columns):
                    distance = memory + i - j
                    if distance < 0 or (window is not None and distance >= window):
                        continue
                    seen.append(j)
                    scores.append(q[h, b, i] @ k[h, b, j] + p[h, b, i] @ r[h, :, columns - distance])
                out[h, b, i] = torch.stack(scores).softmax(0) @ v[h, b, seen]
    return out


def inputs(length: int, memory: int, heads: int = 2, batch: int = 3, width: int = 4) -> list[Tensor]:
    torch.manual_seed(0)
    columns = length + memory
    q, p = (torch.randn(heads, batch, length, width, dtype=F64) for _ in range(2))
    k, v = (torch.randn(heads, batch, columns, width, dtype=F64) for _ in range(2))
    return [q, p, k, v, torch.randn(heads, width, columns + 1, dtype=F64)]


def attend(args: Sequence[Tensor], mask: Tensor | None) -> Tensor:
    q, p, k, v, r = args
    return relative_attention(q, p, k, v, r, mask)


def test_positions_are_sines_then_cosines_of_falling_frequencies():
    distances = torch.tensor([0.0, 1.0, 7.0], dtype=F64)
    table = sinusoidal_positions(distances, 6)
    for row, t in zip(table, (0.0, 1.0, 7.0), strict=True):
        for i in range(3):
            assert row[i].item() == pytest.approx(math.sin(t / 10000 ** (2 * i / 6)), abs=1e-14)
            assert row[3 + i].item() == pytest.approx(math.cos(t / 10000 ** (2 * i / 6)), abs=1e-14)
    with pytest.raises(ValueError, match="even width"):
        sinusoidal_positions(distances, 5)


@pytest.mark.parametrize(("length", "memory"), [(1, 0), (1, 4), (4, 0), (3, 5), (5, 3)])
def test_shift_puts_each_distance_at_its_key_without_a_copy(length, memory):
    columns = length + memory
    distance_of_column = torch.arange(columns, -1, -1)
    product = torch.stack([100 * i + distance_of_column for i in range(length)]).expand(2, 3, -1, -1).contiguous()
    shifted = relative_shift(product)
    assert shifted.shape == (2, 3, length, columns)
    assert shifted.untyped_storage().data_ptr() == product.untyped_storage().data_ptr()
    for i in range(length):
        for j in range(memory + i + 1):  # the keys that query i may see
            assert (shifted[:, :, i, j] == 100 * i + memory + i - j).all()


@pytest.mark.parametrize(("length", "memory", "window"), SIZES)
def test_mask_hides_what_comes_after_or_lies_outside_the_window(length, memory, window):
    mask = relative_mask(length, memory, window, like=torch.zeros((), dtype=F64))
    shifted = torch.zeros(length, length + memory) if mask is None else relative_shift(mask)
    for i in range(length):
        for j in range(length + memory):
            distance = memory + i - j
            seen = distance >= 0 and (window is None or distance < window)
            assert shifted[i, j].item() == (0.0 if seen else -math.inf)


def test_window_below_one_is_refused():
    with pytest.raises(ValueError, match="window is 0"):
        relative_mask(2, 0, 0, like=torch.zeros(()))


@pytest.mark.parametrize(("length", "memory", "window"), SIZES)
def test_attention_is_that_of_the_definition(length, memory, window):
    args = inputs(length, memory)
    mask = relative_mask(length, memory, window, like=args[0])
    torch.testing.assert_close(attend(args, mask), by_loops(args, memory, window), rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*is deprecated:DeprecationWarning")  # torch's own forward mode
def test_derivatives_of_every_kind():
    args = [x.requires_grad_() for x in inputs(2, 1, heads=1, batch=2, width=2)]
    mask = relative_mask(2, 1, like=args[0])

    def attention(*tensors: Tensor) -> Tensor:
        return attend(tensors, mask)

    assert gradcheck(attention, args, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(attention, args)


def test_vmap_over_a_further_dimension():
    args = inputs(3, 2)
    mask = relative_mask(3, 2, like=args[0])
    several = torch.stack([args[0], 2 * args[0]])

    def attention(q: Tensor) -> Tensor:
        return attend([q, *args[1:]], mask)

    expected = torch.stack([attention(q) for q in several])
    torch.testing.assert_close(torch.vmap(attention)(several), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_recorded_positions(shared_golden, dtype):
    _, groups = read(shared_golden / "component_positional_embedding", dtype)
    for recorded in groups.values():
        expected = recorded["out" if dtype == F64 else "out_float32"]  # (1, width, N)
        same(sinusoidal_positions(recorded["pos"], expected.shape[1]).T[None], expected)
