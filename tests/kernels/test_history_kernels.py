"""The kernels of the history against sums in float64, on shapes that fit no tile."""

from __future__ import annotations

import pytest
import torch
from kernel_calls import count_calls

from equilibria.kernels.history import both_dots, combine, dots, reference, store_dots, triton

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
SHAPES = [(1, 1, 1), (1, 3, 7), (3, 1, 37), (2, 5, 1030), (2, 3, 2 * triton.CHUNK + 5)]  # B, m, D
DTYPES = [(F32, F32), (F64, F64), (F32, BF16), (F64, F32)]  # of the vectors, of the history


def made(shape, dtypes, device, spare=2):
    """A history with NaN in the slots not in use, its part in use, and two vectors and weights."""
    torch.manual_seed(0)
    (batch, used, size), (dtype, storage) = shape, dtypes
    ring = torch.full((batch, used + spare, size), torch.nan, device=device, dtype=storage)
    ring[:, :used] = torch.randn(batch, used, size).to(ring)
    vectors = torch.randn(2, batch, size, dtype=F64).to(device, dtype)
    return ring, ring[:, :used], *vectors, torch.randn(batch, used, dtype=F64).to(device, dtype)


def products(history, v):
    """The products and the size of what is added up for them, both in float64, summed pair by pair for the last digits."""
    terms = history.to(F64) * v.to(F64).unsqueeze(1)
    return terms.sum(2), terms.abs().sum(2)


def close(found, exact, rounded):
    return bool(((found.to(F64) - exact).abs() <= 4 * torch.finfo(found.dtype).eps * rounded).all())


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_dots(shape, dtypes, device):
    _, history, v, w, _ = made(shape, dtypes, device)
    found = dots(history, v)
    assert found.dtype == v.dtype
    assert close(found, *products(history, v))
    of_v, of_w = both_dots(history, v, w)
    assert torch.equal(of_v, found)
    assert close(of_w, *products(history, w))


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_combine(shape, dtypes, device):
    _, history, base, _, weights = made(shape, dtypes, device)
    sums, rounded = products(history.mT, weights)
    found = combine(base, weights, history)
    assert found.dtype == base.dtype
    assert close(found, base.to(F64) - sums, base.abs() + rounded)


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("turn", [0, 3])
def test_store_dots(shape, dtypes, turn, device):
    ring, _, new, old, _ = made(shape, dtypes, device, spare=0 if turn else 2)
    slots, used = ring.shape[1], shape[1]
    age = used + turn * slots  # the first slot not in use, or one of those of a full ring
    before, v = ring.clone(), new + 1
    same, found, of_pair = store_dots(ring, age, new, old, v)
    slot = age % slots
    others = [m for m in range(slots) if m != slot]
    assert same is ring
    assert torch.equal(ring[:, others].nan_to_num(7), before[:, others].nan_to_num(7))
    stored = ring[:, slot].to(F64)
    change = new.to(F64) - old.to(F64)
    assert (stored - change).abs().max() <= torch.finfo(ring.dtype).eps * (new.abs() + old.abs()).max()
    # What was stored is what is multiplied.
    in_use = ring[:, : min(age + 1, slots)]
    assert found.shape == of_pair.shape == in_use.shape[:2]
    assert close(found, *products(in_use, v))
    assert close(of_pair, *products(in_use, ring[:, slot]))


def test_strides(device):
    torch.manual_seed(0)
    history = torch.randn(5, 41, 3, device=device).permute(2, 0, 1)[:, ::2]
    v, base = torch.randn(41, 2, 3, device=device).permute(1, 2, 0)
    weights = torch.randn(6, 3, device=device).mT[:, ::2]
    torch.testing.assert_close(dots(history, v), reference.dots(history, v))
    torch.testing.assert_close(both_dots(history, base, v), reference.both_dots(history, base, v))
    torch.testing.assert_close(combine(base, weights, history), reference.combine(base, weights, history))
    buffer = torch.randn(41, 4, 3, device=device).permute(2, 1, 0)
    copy = buffer.clone()
    found, exact = store_dots(buffer, 6, v, base, v), reference.store_dots(copy, 6, v, base, v)
    assert torch.equal(buffer, copy)
    torch.testing.assert_close(found, exact)


def test_a_base_in_few_bits_is_rounded_once(device):
    _, history, _, _, weights = made((2, 3, 65), (F32, F32), device)
    base = torch.randn(2, 65, device=device).to(BF16)
    exact = reference.combine(base.to(F32), weights, history)
    found = combine(base, weights, history)
    assert found.dtype == BF16
    assert (found.to(F32) - exact).abs().max() <= 2**-7 * exact.abs().max()


def test_a_sample_alone_has_the_same_bits(device):
    _, history, v, base, weights = made((3, 4, triton.CHUNK + 9), (F32, F32), device)
    together, summed = dots(history, v), combine(base, weights, history)
    for i in range(3):
        row = slice(i, i + 1)
        assert torch.equal(dots(history[row], v[row]), together[row])
        assert torch.equal(combine(base[row], weights[row], history[row]), summed[row])


def test_nan_in_use_shows_in_its_own_sample_alone(device):
    _, history, v, base, weights = made((3, 4, 50), (F32, F32), device)
    history[1, 2, 7] = torch.nan
    assert dots(history, v).isnan().nonzero().tolist() == [[1, 2]]
    assert combine(base, weights, history).isnan().nonzero().tolist() == [[1, 7]]


def test_what_is_recorded_is_left_to_the_reference(device, monkeypatch):
    called = count_calls(monkeypatch, triton, "dots", "both_dots", "combine", "store_dots")
    _, history, v, base, weights = made((2, 3, 5), (F64, F64), device)
    leaf = v.clone().requires_grad_()
    assert dots(history, leaf).requires_grad
    assert combine(base, weights, history.clone().requires_grad_()).requires_grad
    copy, _, found = store_dots(history, 1, leaf, base, base)
    assert found.requires_grad
    assert both_dots(history, base, leaf)[1].requires_grad
    assert copy is not history
    torch.vmap(dots)(history[None], v[None])
    assert not called
    with torch.no_grad():
        dots(history, leaf)
    store_dots(history, 1, v, base, base)
    combine(base, weights, history)
    both_dots(history, v, base)
    assert called == ["dots", "store_dots", "combine", "both_dots"]
    assert combine(base, weights[:, :0], history[:, :0]).equal(base)  # nothing in use yet
