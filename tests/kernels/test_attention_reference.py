"""The reference of relative attention against loops over queries, with the masks that the models use."""

from __future__ import annotations

import pytest
import torch
from attention_inputs import F64, SIZES, Sizes, attend, by_loops, inputs, masks
from torch.autograd import gradcheck, gradgradcheck

from equilibria.kernels.relative_attention import reference
from equilibria.nn.relative_attention import relative_attention, relative_mask


@pytest.mark.parametrize("sizes", SIZES)
def test_reference(sizes):
    tensors = inputs(sizes)
    tensors[4] = tensors[4].detach().nan_to_num(3)  # it adds before it hides, so that NaN would stay
    mask, drop = masks(sizes)
    mask = None if mask is None else mask.nan_to_num(0, neginf=-torch.inf).to(F64)
    drop = None if drop is None else drop.to(F64)
    found = attend(reference.relative_attention, tensors, mask, drop)
    torch.testing.assert_close(found, by_loops(sizes, tensors, drop), rtol=1e-12, atol=1e-12)
    padding = None if sizes.padding is None else torch.tensor(sizes.padding)
    mask = relative_mask(sizes.length, sizes.memory, sizes.window, padding, like=tensors[0])
    assert torch.equal(found, attend(relative_attention, tensors, mask, drop))


def test_derivatives():
    sizes = Sizes(3, 2, width=2, batch=1, dropout=True)
    tensors = inputs(sizes)
    tensors[4] = tensors[4].detach().nan_to_num(3).requires_grad_()
    mask, drop = masks(sizes)
    mask = None if mask is None else mask.nan_to_num(0, neginf=-torch.inf).to(F64)
    for check in (gradcheck, gradgradcheck):
        assert check(lambda *t: attend(reference.relative_attention, t, mask, drop), tensors)
