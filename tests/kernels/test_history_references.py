"""The references of the history's operations against sums written out, and their derivatives."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from equilibria.kernels.history import reference

F64 = torch.float64


@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
def test_sums_are_taken_in_float32_whatever_is_stored(storage, base_dtype):
    torch.manual_seed(0)
    history = torch.randn(3, 4, 50).to(storage)
    v, weights, base = torch.randn(3, 50), torch.randn(3, 4), torch.randn(3, 50).to(base_dtype)
    exact = torch.einsum("bmd,bd->bm", history.to(F64), v.to(F64))
    found = reference.dots(history, v)
    assert found.dtype == torch.float32
    assert (found - exact).abs().max() < 1e-5
    for twice in reference.both_dots(history, v, v):
        assert (twice - exact).abs().max() < 1e-5
    exact = base.to(F64) - torch.einsum("bm,bmd->bd", weights.to(F64), history.to(F64))
    found = reference.combine(base, weights, history)
    assert found.dtype == base_dtype
    # One rounding to the dtype of the base, at the end.
    assert (found - exact).abs().max() < (1e-5 if base_dtype == torch.float32 else 2**-8 * exact.abs().max())


def test_a_pair_lies_in_its_slot_and_no_other_is_touched_or_read():
    history = torch.full((2, 3, 5), torch.nan, dtype=F64)
    history[:, :1] = 1
    new, old, v = torch.randn(3, 2, 5, dtype=F64).unbind(0)
    same, products, of_pair = reference.store_dots(history, 1, new, old, v)
    assert same is history
    assert torch.equal(history[:, 1], new - old)
    assert history[:, 2].isnan().all()
    torch.testing.assert_close(products, torch.stack([v.sum(1), ((new - old) * v).sum(1)], dim=1))
    torch.testing.assert_close(of_pair, torch.stack([(new - old).sum(1), (new - old).square().sum(1)], dim=1))
    _, products, _ = reference.store_dots(history, 3 * 7, new, old, v)  # a ring that has been filled: all slots are in use
    assert products.shape == (2, 3)
    assert torch.equal(history[:, 0], new - old)


def test_derivatives():
    torch.manual_seed(0)
    history, v, new, old = (torch.randn(*s, dtype=F64, requires_grad=True) for s in [(2, 3, 4), (2, 4), (2, 4), (2, 4)])
    weights = torch.randn(2, 3, dtype=F64, requires_grad=True)
    for check in (gradcheck, gradgradcheck):
        assert check(reference.dots, (history, v))
        assert check(reference.both_dots, (history, v, new))
        assert check(reference.combine, (v, weights, history))
        assert check(lambda h, *rest: reference.store_dots(h, 4, *rest), (history, new, old, v))
