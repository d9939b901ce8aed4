"""The block against an implementation that hoists nothing and takes no shortcut, and against recordings of the original."""

import copy
import itertools
import json
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from segments import TIGHT, assert_compactible
from torch import Tensor
from torch.utils._pytree import tree_map

from equilibria import Anderson, Implicit, Picard, Unrolled
from equilibria.models.causal_convolution import CausalConvolution
from equilibria.models.trellis_block import TrellisBlock, TrellisMasks
from equilibria.nn import parametrizations
from equilibria.nn.computed_once import computed_once
from equilibria.nn.deq import DEQ

# torch uses what it has deprecated when it loads its forward mode.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

F64 = torch.float64
B, L, HIDDEN, OUTPUT = 3, 6, 5, 3
H = HIDDEN + OUTPUT
KERNELS = [(1, 1), (2, 1), (2, 3), (3, 1), (3, 2)]


def make(kernel_size: int = 2, dilation: int = 1, **options: bool | float) -> TrellisBlock:
    """A block with weights large enough to matter, and small enough to converge."""
    torch.manual_seed(0)
    block = TrellisBlock(HIDDEN, OUTPUT, kernel_size, dilation, **options).double()  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return block


def draw(past: int = 1, batch: int = B, length: int = L) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    z, u = torch.randn(batch, length, 2 * H, dtype=F64), torch.randn(batch, length, 4 * H, dtype=F64)
    return z, u, torch.randn(batch, past, 2 * H, dtype=F64)


def naive(block: TrellisBlock, z: Tensor, u: Tensor, past: Tensor, masks: TrellisMasks) -> Tensor:
    """One evaluation of f, position by position and tap by tap."""
    weight, k = block.conv.weight, block.conv.kernel_size[0]
    weight = weight if masks.weight is None else weight * masks.weight
    states = torch.cat((past, z), 1)
    p = past.shape[1]
    rows = []
    for t in range(p, states.shape[1]):
        gates = u[:, t - p] + block.conv.bias
        for j in range(k):
            hidden = states[:, max(t - (k - 1 - j) * block.conv.dilation[0], 0), :H]  # columns before the first repeat it
            gates = gates + (hidden if masks.hidden is None else hidden * masks.hidden[:, 0]) @ weight[:, :, j].T
        i, o, g, f = gates.chunk(4, 1)
        c = torch.sigmoid(f) * states[:, t - 1, H:] + torch.sigmoid(i) * torch.tanh(g)
        rows.append(torch.cat((torch.sigmoid(o) * torch.tanh(c), c), 1))
    return torch.stack(rows, 1)


@pytest.mark.parametrize(
    ("kernel", "weight_norm", "dropout", "past"),
    list(itertools.product(KERNELS, (False, True), (0.0, 0.4), (1, 3, 7))),
)
def test_block_is_the_naive_layer(kernel, weight_norm, dropout, past):
    block = make(*kernel, weight_norm=weight_norm, dropout=dropout, weight_dropout=dropout)
    z, u, before = draw(past)
    masks = block.draw_masks(u)
    assert (masks.hidden is None) == (dropout == 0)
    assert (masks.weight is None) == (dropout == 0 or weight_norm)
    with computed_once(block):  # one draw of the weights that are dropped before they are normalised
        ours, expected = block(z, *block.prepare(u, before, masks)), naive(block, z, u, before, masks)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-13)


def test_without_past_stands_a_column_of_zeros():
    block = make(3, 2)
    z, u, past = draw()
    assert torch.equal(block(z, *block.prepare(u)), block(z, *block.prepare(u, 0 * past)))


def test_block_is_the_recorded_layer(shared_golden):
    load_file = pytest.importorskip("safetensors.torch").load_file
    folder = shared_golden / "component_trellis_layer"
    recorded = load_file(folder / "tensors.safetensors")
    names = {
        "bias": "bias",
        "weight": "weight",
        "weight_g": "parametrizations.weight.original0",
        "weight_v": "parametrizations.weight.original1",
    }
    for variant, sizes in json.loads((folder / "config.json").read_text())["variants"].items():
        case = {key.removeprefix(f"{variant}/"): x for key, x in recorded.items() if key.startswith(f"{variant}/")}
        block = TrellisBlock(sizes["nhid"], sizes["nout"], sizes["k"], sizes["dil"], weight_norm=sizes["wn"]).double()
        state = {key.removeprefix("param.full_conv."): x for key, x in case.items() if key.startswith("param.")}
        block.conv.load_state_dict({names[key]: x for key, x in state.items()})
        inputs = {key: case[key].transpose(1, 2).clone().requires_grad_() for key in ("z", "u", "z0")}
        output = block(inputs["z"], *block.prepare(inputs["u"], inputs["z0"]))
        output.backward(case["upstream"].transpose(1, 2))
        found = {"layer_out": output} | {f"grad.{key}": x.grad for key, x in inputs.items()}
        for key, value in found.items():
            assert_recorded(value, case[key].transpose(1, 2), f"{variant}/{key}")
        own = dict(block.conv.named_parameters())
        for key in state:
            assert_recorded(own[names[key]].grad, case[f"grad.full_conv.{key}"], f"{variant}/{key}")


def assert_recorded(ours: Tensor | None, theirs: Tensor, what: str) -> None:
    assert ours is not None
    assert ours.shape == theirs.shape
    assert (ours - theirs).norm() <= 1e-11 * theirs.norm(), what


@pytest.mark.parametrize("weight_norm", [False, True])
def test_gradients_are_those_of_the_naive_layer(weight_norm):
    block = make(3, 2, weight_norm=weight_norm, dropout=0.2, weight_dropout=0.2)
    z, u, past = draw(2)
    masks = block.draw_masks(u)
    leaves = [*block.parameters(), z.requires_grad_(), u.requires_grad_(), past.requires_grad_()]
    direction = torch.randn(B, L, 2 * H, dtype=F64)
    with computed_once(block):
        outputs = block(z, *block.prepare(u, past, masks)), naive(block, z, u, past, masks)
    ours, expected = (torch.autograd.grad((x * direction).sum(), leaves, retain_graph=True) for x in outputs)
    torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("kernel", KERNELS)
def test_single_precision_takes_another_way_to_the_same_convolution(kernel):
    """In float32, a convolution of channels-last tensors; its values and derivatives are those of the matrix product."""
    double, single = make(*kernel), make(*kernel).float()
    z, u, past = draw()
    v = torch.randn_like(z)
    ways = [block.conv.taps().dim() for block in (double, single)]
    assert ways == ([2, 4] if torch.backends.mkldnn.is_available() else [2, 2])
    exact = derivatives(partial(at, double, double.prepare(u, past)), z, v)
    ours = derivatives(partial(at, single, single.prepare(u.float(), past.float())), z.float(), v.float())
    for found, expected in zip(ours, exact, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


def at(block: TrellisBlock, args: tuple[Any, ...], z: Tensor) -> Tensor:
    return block(z, *args)


def derivatives(f: Callable[[Tensor], Tensor], z: Tensor, v: Tensor) -> list[Tensor]:
    """f, mapped over a batch of batches; its derivatives forward and backward along v, and one of the second order."""
    mapped = torch.func.vmap(f)(torch.stack((z, v)))
    _, pushed = torch.func.jvp(f, (z,), (v,))[:2]
    _, pull = torch.func.vjp(f, z)[:2]
    second = torch.func.grad(lambda z: torch.func.grad(lambda z: f(z).pow(3).sum())(z).pow(2).sum())(z)
    return [mapped, pushed, pull(v)[0], second]


def test_any_number_of_derivatives_and_forward_mode():
    block = make(2, 2, weight_norm=True)
    z, u, past = draw(batch=1, length=3)
    leaves = [x.requires_grad_() for x in (z, u, past)]

    def f(z: Tensor, u: Tensor, past: Tensor) -> Tensor:
        return block(z, *block.prepare(u, past))

    assert torch.autograd.gradcheck(f, leaves, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(f, leaves)


def test_causal_convolution_is_the_convolution():
    convolution = CausalConvolution(4, 7, 3, dilation=2, init_std=0.5).double()
    x = torch.randn(2, 9, 4, dtype=F64)
    expected = torch.nn.functional.conv1d(x.transpose(1, 2), convolution.weight, convolution.bias, dilation=2)
    torch.testing.assert_close(convolution(x), expected.transpose(1, 2), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("weight_norm", [False, True])
def test_dropped_weights_are_drawn_once_and_keep_the_last_tap(weight_norm):
    torch.manual_seed(0)
    convolution = CausalConvolution(20, 30, 2, weight_dropout=0.5, weight_norm=weight_norm, init_std=1.0)
    kept = convolution.eval().weight.detach().clone()
    assert torch.equal(convolution.taps(convolution.draw_mask()), convolution.taps())
    convolution.train()
    with computed_once(convolution):
        mask = convolution.draw_mask()
        assert (mask is None) == weight_norm
        dropped = convolution.weight if mask is None else convolution.weight * mask
        if weight_norm:  # of the length that it had, and of another direction
            assert torch.equal(convolution.weight, dropped)
            torch.testing.assert_close(dropped.flatten(1).norm(dim=1), kept.flatten(1).norm(dim=1))
        else:
            assert torch.equal(dropped[..., 1], kept[..., 1])
    assert (dropped[..., 1] != 0).all()
    assert 0.4 < (dropped[..., 0] == 0).float().mean() < 0.6
    assert "weight" in dict(convolution.named_parameters()) or weight_norm


def test_forward_uses_its_args_and_nothing_else():
    block = make(weight_dropout=0.3, dropout=0.2)
    z, u, past = draw()
    args = block.prepare(u, past, block.draw_masks(u))
    args = tree_map(lambda x: x if x is None else x.clone(), args)
    before = block(z, *args)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.fill_(float("nan"))
    block.eval()
    assert torch.equal(block(z, *args), before)


def test_weight_norm_is_computed_once_per_solve(monkeypatch):
    block = make(weight_norm=True)
    _, u, past = draw()
    calls = []
    original = parametrizations.WeightNorm.forward
    monkeypatch.setattr(parametrizations.WeightNorm, "forward", lambda self, *gv: calls.append(1) or original(self, *gv))
    z, stats = DEQ(block, stopping=TIGHT)(u, past)
    z.sum().backward()
    assert stats.evaluations > 5
    assert len(calls) == 1


def test_initialisation_reaches_weights_under_weight_norm():
    torch.manual_seed(0)
    plain = TrellisBlock(40, 24, init_std=0.03)
    torch.manual_seed(0)
    normed = TrellisBlock(40, 24, init_std=0.03, weight_norm=True)
    assert plain.conv.weight.std().item() == pytest.approx(0.03, rel=0.05)
    torch.testing.assert_close(normed.conv.weight, plain.conv.weight)
    parts = dict(normed.conv.named_parameters())
    gain, direction = parts["parametrizations.weight.original0"], parts["parametrizations.weight.original1"]
    assert gain.shape == (4 * 64, 1, 1)
    torch.testing.assert_close(gain * direction / direction.flatten(1).norm(dim=1)[:, None, None], plain.conv.weight)
    assert plain.conv.bias.abs().max() == 0


def test_deepcopy_is_independent():
    block = make(weight_norm=True)
    z, u, past = draw()
    before = block(z, *block.prepare(u, past))
    twin = copy.deepcopy(block)
    assert torch.equal(twin(z, *twin.prepare(u, past)), before)
    with torch.no_grad():
        next(twin.conv.parameters()).mul_(2)
    assert torch.equal(block(z, *block.prepare(u, past)), before)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_later_position_does_not_move_earlier_equilibria(kernel):
    deq = DEQ(make(*kernel), stopping=TIGHT)
    _, u, past = draw()
    changed = u.clone()
    changed[:, 3] += 1.0
    before, after = deq(u, past).z, deq(changed, past).z
    torch.testing.assert_close(after[:, :3], before[:, :3], rtol=1e-9, atol=1e-10)
    assert (after[:, 3:] - before[:, 3:]).abs().amax(dim=(0, 2)).min() > 1e-5


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_segment_continues_where_the_columns_before_it_are_its_past(kernel):
    deq = DEQ(make(*kernel), stopping=TIGHT)
    _, u, past = draw(length=10)
    whole = deq(u, past).z
    first = deq(u[:, :6], past).z
    second = deq(u[:, 6:], torch.cat((past, first), 1)).z
    torch.testing.assert_close(torch.cat((first, second), 1), whole, rtol=1e-9, atol=1e-10)


def test_frozen_masks_give_an_equilibrium_with_the_gradient_of_the_unrolled_solve():
    block = make(3, 1, dropout=0.3, weight_dropout=0.1)
    _, u, past = draw()
    masks = block.draw_masks(u)
    u.requires_grad_()
    past.requires_grad_()
    direction = torch.randn(B, L, 2 * H, dtype=F64)
    gradients = []
    for solver, adjoint in ((Anderson(), Implicit(stopping=TIGHT)), (Picard(), Unrolled())):
        z, stats = DEQ(block, solver=solver, stopping=TIGHT, adjoint=adjoint)(u, past, masks)
        assert stats.converged.all()
        torch.testing.assert_close(naive(block, z, u, past, masks), z, rtol=0, atol=1e-10)
        gradients.append(torch.autograd.grad((z * direction).sum(), [u, past, *block.parameters()]))
    for implicit, unrolled in zip(*gradients, strict=True):
        assert (implicit - unrolled).norm() <= 1e-6 * unrolled.norm() + 1e-12


def test_batch_dims_let_the_batch_be_compacted_without_changing_the_answer():
    block = make(3, 2, dropout=0.3, weight_dropout=0.1)
    _, u, past = draw(batch=6)
    with torch.no_grad():
        u[:4] *= 0.01  # these converge early
    masks = block.draw_masks(u)
    args = block.prepare(u, past, masks)
    whole = assert_compactible(block, u, args, torch.randn(6, L, 2 * H, dtype=F64))
    for b in range(6):
        assert masks.hidden is not None
        own = masks._replace(hidden=masks.hidden[b : b + 1])
        alone = DEQ(block, stopping=TIGHT)(u[b : b + 1], past[b : b + 1], own).z
        torch.testing.assert_close(whole[b : b + 1], alone, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", ["d_hidden", "d_output", "kernel_size", "dilation"])
def test_impossible_sizes(name):
    with pytest.raises(ValueError, match=f"{name} is 0; give 1 or more"):
        TrellisBlock(**({"d_hidden": 2, "d_output": 2} | {name: 0}))  # type: ignore[arg-type]
