"""The kernels of relative attention against loops over queries in float64: the output and every gradient."""

from __future__ import annotations

import pytest
import torch
from attention_inputs import F64, SIZES, Sizes, attend, by_loops, inputs, masks
from kernel_calls import count_calls
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from equilibria import Stopping, fixed_point
from equilibria.kernels import choice
from equilibria.kernels.relative_attention import reference, relative_attention, triton
from equilibria.models.block import DropoutMasks, Memory, TransformerBlock

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own

# What one rounding of the scores, of the weights and of each gradient may do. The interpreter has no products of bfloat16,
# a GPU none of float64.
FEW_BITS = torch.float16 if choice.INTERPRETED else torch.bfloat16
TOLERANCES = {torch.float32: 2e-6, FEW_BITS: 8 * torch.finfo(FEW_BITS).eps}
if choice.INTERPRETED:
    TOLERANCES[F64] = 1e-14


def close(found: Tensor, exact: Tensor) -> bool:
    scale = exact.abs().max().clamp(min=1)
    return bool((found.to(F64) - exact).abs().max() <= TOLERANCES[found.dtype] * scale)


EXACT = F64 if choice.INTERPRETED else torch.float32


@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [*((s, EXACT) for s in SIZES), *((s, d) for s in (SIZES[4], SIZES[6]) for d in TOLERANCES if d != EXACT)],
)
def test_output_and_every_gradient(sizes, dtype, device, monkeypatch):
    called = count_calls(monkeypatch, triton, "forward", "backward")
    tensors = inputs(sizes, dtype, device)
    mask, drop = masks(sizes, device)
    found = attend(relative_attention, tensors, mask, drop)
    exact = by_loops(sizes, tensors, drop)
    assert found.dtype == dtype
    assert close(found, exact)
    grad = torch.randn_like(exact).to(dtype)
    gradients = torch.autograd.grad(found, tensors, grad)
    for mine, true in zip(gradients, torch.autograd.grad(exact, tensors, grad.to(F64)), strict=True):
        assert mine.dtype == dtype
        assert mine.isfinite().all()
        assert close(mine, true.to(F64))
    assert called == ["forward", "backward"]


def test_strides(device):
    sizes = Sizes(5, 4)
    tensors = inputs(sizes, torch.float32, device)
    mask, drop = masks(sizes._replace(dropout=True), device)
    other = [t.detach().transpose(-1, -2).contiguous().transpose(-1, -2).requires_grad_() for t in tensors]
    assert not other[0].is_contiguous()
    assert mask is not None
    assert drop is not None
    found = attend(relative_attention, tensors, mask, drop)
    same = attend(relative_attention, other, mask.mT.contiguous().mT, drop.mT.contiguous().mT)
    assert torch.equal(found, same)
    upper = torch.randn_like(found.permute(1, 2, 0, 3)).permute(2, 0, 1, 3)  # as the heads are joined again
    gradients = torch.autograd.grad(found, tensors, upper.contiguous())
    for a, b in zip(gradients, torch.autograd.grad(same, other, upper), strict=True):
        assert torch.equal(a, b)


def test_a_sample_alone_has_the_same_bits(device):
    sizes = Sizes(6, 20, batch=3)
    tensors = [t.detach() for t in inputs(sizes, torch.float32, device)]
    mask, _ = masks(sizes, device)
    together = attend(relative_attention, tensors, mask)
    alone = attend(relative_attention, [*(t[:, 1:2] for t in tensors[:4]), tensors[4]], mask)
    assert torch.equal(together[:, 1:2], alone)


def test_only_the_gradients_asked_for_are_computed(device, monkeypatch):
    launched: list[str] = []
    launch = triton._launch
    monkeypatch.setattr(
        triton, "_launch", lambda kernel, *rest: (launched.append(kernel.fn.__name__), launch(kernel, *rest))
    )
    tensors = inputs(Sizes(3, 2), torch.float32, device)
    mask, _ = masks(Sizes(3, 2), device)
    content, position, keys, values, positions = tensors
    for wanted, expected in (
        ([content], ["_backward_queries"]),
        ([position, values], ["_backward_queries", "_backward_keys"]),
        ([positions], ["_backward_positions"]),
        ([keys], ["_backward_keys"]),
    ):
        asked = [t if any(t is w for w in wanted) else t.detach() for t in tensors]
        found = attend(relative_attention, asked, mask)
        launched.clear()
        torch.autograd.grad(found.sum(), wanted)
        assert launched == expected


def finite_inputs(sizes: Sizes, device: torch.device) -> tuple[list[Tensor], Tensor | None, Tensor | None]:
    """For what the reference does: it adds before it hides, so that NaN would stay."""
    tensors = [t.detach().nan_to_num(1.0).requires_grad_() for t in inputs(sizes, F64, device)]
    mask, drop = masks(sizes, device)
    return tensors, None if mask is None else mask.nan_to_num(0.0, neginf=-torch.inf).to(F64), drop


@pytest.mark.skipif(not choice.INTERPRETED, reason="on a GPU the kernels leave float64 to the reference")
def test_higher_derivatives_are_those_of_the_reference(device):
    tensors, mask, drop = finite_inputs(Sizes(2, 1, heads=1, width=2, batch=1, dropout=True), device)
    query, *rest = tensors
    apply = lambda q, p, *others: attend(relative_attention, (q, p + 2 * q, *others), mask, drop)  # noqa: E731
    assert gradcheck(apply, (query, *rest), check_batched_grad=True, fast_mode=True)
    assert gradgradcheck(apply, (query, *rest), fast_mode=True)


@pytest.mark.skipif(not choice.INTERPRETED, reason="on a GPU the kernels leave float64 to the reference")
def test_transforms_and_forward_mode_are_left_to_the_reference(device, monkeypatch):
    called = count_calls(monkeypatch, triton, "forward", "backward")
    tensors, mask, _ = finite_inputs(Sizes(3, 2), device)
    tensors = [t.detach() for t in tensors]
    apply = lambda q: attend(relative_attention, (q, *tensors[1:]), mask)  # noqa: E731
    plain = lambda q: attend(reference.relative_attention, (q, *tensors[1:]), mask)  # noqa: E731
    query = tensors[0]
    for a, b in zip(torch.func.jvp(apply, (query,), (query,)), torch.func.jvp(plain, (query,), (query,)), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(torch.func.grad(lambda q: apply(q).sum())(query), torch.func.grad(lambda q: plain(q).sum())(query))
    torch.vmap(apply)(torch.stack([query, query]))
    assert not called


def test_a_mask_that_is_learnt_and_mixed_dtypes_are_left_to_the_reference(device, monkeypatch):
    called = count_calls(monkeypatch, triton, "forward")
    tensors, mask, _ = finite_inputs(Sizes(3, 2), device)
    assert mask is not None
    learnt = mask.clamp(min=-9).requires_grad_()
    (found,) = torch.autograd.grad(attend(relative_attention, tensors, learnt).sum(), learnt)
    assert found.isfinite().all()
    drop = torch.ones(2, 2, 3, 5, dtype=F64, device=device, requires_grad=True)
    torch.autograd.grad(attend(relative_attention, tensors, mask, drop).sum(), drop)
    assert not called


def test_autocast_casts_as_it_does_for_matrix_products(device, monkeypatch):
    called = count_calls(monkeypatch, triton, "forward", "backward")
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda _: FEW_BITS)  # the interpreter has no products of bfloat16
    sizes = Sizes(5, 3)
    tensors = inputs(sizes, torch.float32, device)
    mask, _ = masks(sizes, device)
    mixed = [tensors[0].to(FEW_BITS), *tensors[1:]]  # a linear map gives few bits, a bias added to it float32 again
    with torch.autocast(device.type):
        found = attend(relative_attention, mixed, mask)
    assert found.dtype == FEW_BITS
    assert close(found, by_loops(sizes, tensors, None))
    gradients = torch.autograd.grad(found.float().sum(), tensors)
    assert all(g.dtype == torch.float32 for g in gradients)
    assert called == ["forward", "backward"]


def test_a_block_solved_with_the_kernels(device, monkeypatch):
    """A block of the language model at its equilibrium, with the gradient through it, with and without the kernels."""
    torch.manual_seed(0)
    block = TransformerBlock(d_model=16, n_head=2, d_inner=24, attention_dropout=0.2, init_std=0.1).to(device)
    injection = torch.randn(2, 6, 48, device=device, requires_grad=True)
    past = Memory(torch.randn(2, 4, 16, device=device), torch.randn(2, 4, 48, device=device))
    upper = torch.randn(2, 6, 16, device=device)
    masks = DropoutMasks(weights=block.draw_weights_mask(injection, 10))
    called = count_calls(monkeypatch, triton, "forward", "backward")
    found = []
    for asked in (True, False):
        monkeypatch.setattr(choice, "ASKED", asked)
        args = block.prepare(injection, past, masks, 7)
        z, stats = fixed_point(block, block.initial(injection), *args, stopping=Stopping(rtol=1e-5))
        assert (stats.relative <= 1e-5).all()
        gradients = torch.autograd.grad(z, [injection, *block.parameters()], upper)
        assert {"forward", "backward"} <= set(called) if asked else not called
        called.clear()
        found.append((z, *gradients))
    for with_kernels, without in zip(*found, strict=True):
        torch.testing.assert_close(with_kernels, without, rtol=1e-3, atol=1e-3 * float(without.detach().abs().max()))
