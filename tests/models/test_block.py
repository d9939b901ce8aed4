"""The block against an implementation that hoists nothing and takes no shortcut."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from segments import TIGHT, assert_compactible
from torch import Tensor
from torch.utils._pytree import tree_map

from equilibria import Anderson, Implicit, Picard, Unrolled
from equilibria.models.block import DropoutMasks, KeysValues, Memory, TransformerBlock
from equilibria.nn import parametrizations
from equilibria.nn.deq import DEQ
from equilibria.nn.relative_attention import sinusoidal_positions

F64 = torch.float64
B, L, M, D, H, INNER = 3, 5, 4, 16, 2, 12


def make(**options: bool | float) -> TransformerBlock:
    """A block with weights large enough to matter, and small enough to converge."""
    torch.manual_seed(0)
    block = TransformerBlock(D, H, INNER, **options).double()  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return block


def draw(length: int = L, memory: int = M, batch: int = B) -> tuple[Tensor, Tensor, Memory]:
    torch.manual_seed(1)
    z, u = torch.randn(batch, length, D, dtype=F64), 2 * torch.randn(batch, length, 3 * D, dtype=F64)
    return z, u, Memory(torch.randn(batch, memory, D, dtype=F64), 2 * torch.randn(batch, memory, 3 * D, dtype=F64))


def times(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x * mask


def naive(block: TransformerBlock, z: Tensor, u: Tensor, memory: Memory, masks: DropoutMasks, window: int | None) -> Tensor:
    """One evaluation of f, position by position, from states and injections alone."""
    width, m = D // H, memory.z.shape[1]
    states, injections = torch.cat((memory.z, z), 1), torch.cat((memory.u, u), 1)
    columns = states.shape[1]

    def norm(x: Tensor) -> Tensor:
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()

    projected = block.qkv(norm(states) if block.pre_norm else states) + injections
    q, k, v = projected.view(-1, columns, 3, H, width).unbind(2)
    table = sinusoidal_positions(torch.arange(columns, dtype=F64), D)
    r = block.position(times(table, masks.positions)).view(columns, H, width)
    rows = []
    for i in range(z.shape[1]):
        visible = [j for j in range(m + i + 1) if window is None or m + i - j < window]
        content = torch.einsum("bhe,bjhe->bhj", q[:, m + i] + block.content_bias, k[:, visible])
        distances = [m + i - j for j in visible]
        position = torch.einsum("bhe,jhe->bhj", q[:, m + i] + block.position_bias, r[distances])
        weights = ((content + position) / width**0.5).softmax(-1)
        rows.append(torch.einsum("bhj,bjhe->bhe", weights, v[:, visible]).flatten(1))
    attended = z + times(block.attention_out(torch.stack(rows, 1)), masks.attention)
    state = norm(attended)
    output = state + times(block.ff_out(times(F.relu(block.ff_in(state)), masks.hidden)), masks.output)
    return output if block.pre_norm else norm(output)


@pytest.mark.parametrize(
    ("pre_norm", "weight_norm", "dropout", "memory", "window"),
    list(itertools.product((False, True), (False, True), (0.0, 0.4), (0, M), (None, 3))),
)
def test_block_is_the_naive_layer(pre_norm, weight_norm, dropout, memory, window):
    block = make(pre_norm=pre_norm, weight_norm=weight_norm, dropout=dropout)
    z, u, past = draw(memory=memory)
    masks = block.draw_masks(u)
    assert (masks.attention is None) == (dropout == 0)
    args = block.prepare(u, past if memory else None, masks, window)
    torch.testing.assert_close(block(z, *args), naive(block, z, u, past, masks, window), rtol=1e-11, atol=1e-12)


def test_gradients_are_those_of_the_naive_layer():
    block = make(weight_norm=True, dropout=0.2)
    z, u, past = draw()
    masks = block.draw_masks(u)
    leaves = [*block.parameters(), z.requires_grad_(), u.requires_grad_(), *(x.requires_grad_() for x in past)]
    direction = torch.randn(B, L, D, dtype=F64)
    ours = torch.autograd.grad((block(z, *block.prepare(u, past, masks, 4)) * direction).sum(), leaves)
    expected = torch.autograd.grad((naive(block, z, u, past, masks, 4) * direction).sum(), leaves)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-11)


def test_forward_uses_its_args_and_nothing_else():
    block = make(weight_norm=True, dropout=0.2)
    z, u, past = draw()
    args = block.prepare(u, past, block.draw_masks(u))
    args = tree_map(lambda x: x if x is None else x.clone(), args)  # biases are passed as they are
    before = block(z, *args)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.fill_(float("nan"))
    block.eval()
    assert torch.equal(block(z, *args), before)


def test_past_as_keys_and_values_is_past_as_memory():
    block = make(pre_norm=True)
    z, u, past = draw()
    solved = block.keys_values(*past)
    assert isinstance(solved, KeysValues)
    assert torch.equal(block(z, *block.prepare(u, solved)), block(z, *block.prepare(u, past)))


def test_weight_norm_is_computed_once_per_solve(monkeypatch):
    block = make(weight_norm=True)
    _, u, past = draw()
    calls = []
    original = parametrizations.WeightNorm.forward
    monkeypatch.setattr(parametrizations.WeightNorm, "forward", lambda self, *gv: calls.append(1) or original(self, *gv))
    z, stats = DEQ(block, stopping=TIGHT)(u, past)
    z.sum().backward()
    assert stats.evaluations > 5
    assert len(calls) == 5  # qkv, positions, attention output, and the two of the feed-forward part


def test_weight_norm_has_unit_directions_and_survives_deepcopy():
    block = make(weight_norm=True)
    parts = dict(block.qkv.named_parameters())
    gain, direction = parts["parametrizations.weight.original0"], parts["parametrizations.weight.original1"]
    expected = gain * direction / direction.norm(dim=1, keepdim=True)
    torch.testing.assert_close(block.qkv.weight, expected, rtol=1e-12, atol=1e-14)
    twin = copy.deepcopy(block)
    z, u, past = draw()
    assert torch.equal(twin(z, *twin.prepare(u, past)), block(z, *block.prepare(u, past)))
    with torch.no_grad():
        next(twin.qkv.parameters()).mul_(2)
    torch.testing.assert_close(block.qkv.weight, expected, rtol=1e-12, atol=1e-14)


def test_initialisation_reaches_weights_under_weight_norm():
    torch.manual_seed(0)
    plain = TransformerBlock(64, 4, 128)
    torch.manual_seed(0)
    normed = TransformerBlock(64, 4, 128, weight_norm=True)
    for name in ("qkv", "position", "attention_out", "ff_in", "ff_out"):
        weight = getattr(plain, name).weight
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)
        torch.testing.assert_close(getattr(normed, name).weight, weight)
    assert plain.ff_in.bias.abs().max() == 0
    assert plain.position_bias.std().item() == pytest.approx(0.02, rel=0.3)


def test_a_later_position_does_not_move_earlier_equilibria():
    deq = DEQ(make(), stopping=TIGHT)
    _, u, past = draw()
    changed = u.clone()
    changed[:, 3] += 1.0
    before, after = deq(u, past).z, deq(changed, past).z
    torch.testing.assert_close(after[:, :3], before[:, :3], rtol=1e-9, atol=1e-10)
    assert (after[:, 3:] - before[:, 3:]).abs().amax(dim=(0, 2)).min() > 1e-3


def test_frozen_masks_give_an_equilibrium_with_the_gradient_of_the_unrolled_solve():
    block = make(dropout=0.3)
    _, u, past = draw()
    masks = block.draw_masks(u)
    u.requires_grad_()
    direction = torch.randn(B, L, D, dtype=F64)
    gradients = []
    for solver, adjoint in ((Anderson(), Implicit(stopping=TIGHT)), (Picard(), Unrolled())):
        z, stats = DEQ(block, solver=solver, stopping=TIGHT, adjoint=adjoint)(u, past, masks)
        assert stats.converged.all()
        torch.testing.assert_close(naive(block, z, u, past, masks, None), z, rtol=0, atol=1e-10)
        gradients.append(torch.autograd.grad((z * direction).sum(), [u, *block.parameters()]))
    for implicit, unrolled in zip(*gradients, strict=True):
        assert (implicit - unrolled).norm() <= 1e-6 * unrolled.norm() + 1e-12


def test_batch_dims_let_the_batch_be_compacted_without_changing_the_answer():
    block = make(dropout=0.3)
    _, u, past = draw(batch=6)
    with torch.no_grad():
        u[:4] *= 0.01  # these converge early
    masks = block.draw_masks(u)
    args = block.prepare(u, past, masks)
    whole = assert_compactible(block, u, args, torch.randn(6, L, D, dtype=F64))
    for b in range(6):
        one = past._replace(z=past.z[b : b + 1], u=past.u[b : b + 1])
        own = DropoutMasks(masks.positions, *(None if mask is None else mask[b : b + 1] for mask in masks[1:]))
        alone = DEQ(block, stopping=TIGHT)(u[b : b + 1], one, own).z
        torch.testing.assert_close(whole[b : b + 1], alone, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    ("sizes", "message"), [((8, 3, 4), "not a multiple of n_head"), ((5, 5, 4), "even width"), ((8, 0, 4), "n_head is 0")]
)
def test_impossible_sizes(sizes, message):
    with pytest.raises(ValueError, match=message):
        TransformerBlock(*sizes)
