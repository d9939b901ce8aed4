"""Weight norm as recorded, and the drops of convolution weights and of the direction of weight norm."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from problems import normal
from recorded import TOLERANCES, read, same
from torch import Tensor, nn

from equilibria import DEQ, Implicit, Stopping
from equilibria.nn import weight_drop, weight_norm

F64 = torch.float64
TIGHT = Stopping(rtol=1e-12, atol=1e-14, max_evals=200)


class Holder(nn.Module):
    """A weight and nothing else."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.clone())


def parts(layer: Any) -> Any:
    return layer.parametrizations.weight


def drawn(drop: Any, mask: Tensor) -> None:
    """Let a drop draw this mask from now on."""
    drop.drop.mask = lambda like: mask.to(like)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_recorded_weight_norm(shared_golden, dtype):
    config, groups = read(shared_golden / "component_weight_norm", dtype)
    for name, options in config["variants"].items():
        recorded = groups[name]
        layer = weight_norm(Holder(recorded["w_initial"]), dim=options["dim"])
        same(parts(layer).original0.detach(), recorded["g_initial"])
        layer.load_state_dict(
            {
                "parametrizations.weight.original0": recorded["g"],
                "parametrizations.weight.original1": recorded["v"],
            }
        )
        weight = layer.weight
        same(weight, recorded["w"])
        weight.backward(recorded["upstream"])
        same(parts(layer).original0.grad, recorded["grad.g"])
        same(parts(layer).original1.grad, recorded["grad.v"])


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_recorded_weight_drop(shared_golden, dtype):
    config, groups = read(shared_golden / "component_dropouts", dtype)
    r = groups["weightdrop"]
    units, channels, taps = r["raw"].shape
    layer = nn.Conv1d(channels, units, taps, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(r["raw"])
        assert layer.bias is not None
        layer.bias.copy_((r["out_eval"] - nn.functional.conv1d(r["x"], r["raw"])).mean((0, 2)))  # which is not recorded
    weight_drop(layer, p=config["p"], keep_last_tap=True)
    torch.manual_seed(0)
    mask = layer.weight / r["raw"]
    assert torch.equal(mask[..., -1], torch.ones_like(mask[..., -1]))
    recorded_values = (r["effective"] / r["raw"])[..., :-1].unique()
    assert {round(v, 4) for v in mask[..., :-1].unique().tolist()} == {round(v, 4) for v in recorded_values.tolist()}
    drawn(parts(layer)[0], r["effective"] / r["raw"])
    same(layer.weight, r["effective"])
    same(layer(r["x"]), r["out"])
    del parts(layer)[0].drop.mask
    same(layer.eval()(r["x"]), r["out_eval"])


@pytest.mark.parametrize(("shape", "kept"), [((6, 5, 3), True), ((6, 5, 2), True), ((6, 5, 1), False), ((6, 5), False)])
def test_only_convolutions_with_several_taps_have_a_last_one(shape, kept):
    torch.manual_seed(0)
    holder = weight_drop(Holder(torch.ones(shape)), p=0.5, keep_last_tap=True)
    weights = torch.stack([holder.weight for _ in range(20)])
    assert (weights == 0).any()
    assert bool((weights[..., -1] == 1).all()) == kept
    assert (weight_drop(Holder(torch.ones(shape)), p=0.5).weight[..., -1] != 1).all()


class TestDirectionDrop:
    weight = normal(0, 6, 5, 3)

    @pytest.mark.parametrize("dim", [0, 1, None])
    @pytest.mark.parametrize("keep_last_tap", [True, False])
    def test_slices_keep_their_length_and_entries_of_v_are_gone(self, dim: int | None, keep_last_tap: bool) -> None:
        torch.manual_seed(0)
        layer = weight_norm(Holder(self.weight), dim=dim, direction_drop=0.4, keep_last_tap=keep_last_tap)
        found = layer.weight
        dropped = found == 0
        assert dropped[..., :-1].any()
        assert bool(dropped[..., -1].any()) == (not keep_last_tap)
        g, v = parts(layer).original0, parts(layer).original1
        scale = torch.full_like(v, 1 / 0.6)
        if keep_last_tap:
            scale[..., -1] = 1.0
        v = v * torch.where(dropped, 0, scale)
        dims = [i for i in range(3) if dim is None or i != dim]
        expected = g * v / torch.linalg.vector_norm(v, dim=dims, keepdim=True)
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-15)
        torch.testing.assert_close(torch.linalg.vector_norm(found, dim=dims, keepdim=True), g, rtol=1e-13, atol=0)

    def test_names_are_those_of_weight_norm_and_nothing_is_dropped_in_evaluation(self) -> None:
        plain, layer = weight_norm(Holder(self.weight)), weight_norm(Holder(self.weight), direction_drop=0.4).eval()
        assert plain.state_dict().keys() == layer.state_dict().keys()
        assert torch.equal(plain.weight, layer.weight)

    def test_gradients_for_a_given_mask(self) -> None:
        layer = weight_norm(Holder(self.weight), direction_drop=0.4)
        drawn(parts(layer)[0].drop, (normal(1, 6, 5, 3) > 0) / 0.6)
        values = (parts(layer).original0, parts(layer).original1)
        assert torch.autograd.gradcheck(lambda g, v: parts(layer)[0](g, v), values)
        assert torch.autograd.gradgradcheck(lambda g, v: parts(layer)[0](g, v), values)

    def test_a_slice_of_which_nothing_is_left_is_zero(self) -> None:
        layer = weight_norm(Holder(self.weight), direction_drop=0.4)
        mask = torch.ones(6, 5, 3)
        mask[2] = 0.0
        drawn(parts(layer)[0].drop, mask)
        found = layer.weight
        assert not found[2].any()
        found.sum().backward()
        for part in (parts(layer).original0, parts(layer).original1):
            assert torch.as_tensor(part.grad).isfinite().all()

    def test_is_one_mask_per_solve(self) -> None:
        class Block(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner: Any = nn.Linear(6, 6, bias=False, dtype=F64)
                with torch.no_grad():
                    self.inner.weight.copy_(0.1 * normal(0, 6, 6))
                weight_norm(self.inner, direction_drop=0.4)

            def forward(self, z: Tensor, x: Tensor) -> Tensor:
                return torch.tanh(self.inner(z) + x)

        block, x = Block(), normal(1, 3, 6)
        deq = DEQ(block, stopping=TIGHT, adjoint=Implicit(stopping=TIGHT))
        torch.manual_seed(1)
        z, stats = deq(x)
        assert stats.converged.all()
        torch.manual_seed(1)
        weight = block.inner.weight
        torch.testing.assert_close(torch.tanh(z @ weight.T + x), z, rtol=1e-11, atol=0)
        copied = copy.deepcopy(deq)
        torch.manual_seed(1)
        assert torch.equal(copied(x).z, z)

    def test_registration_draws_no_random_number(self) -> None:
        state = torch.get_rng_state()
        weight_norm(Holder(self.weight), direction_drop=0.4)
        assert torch.equal(torch.get_rng_state(), state)

    @pytest.mark.parametrize("p", [-0.1, 1.0, math.nan])
    def test_impossible_probability(self, p: float) -> None:
        with pytest.raises(ValueError, match="at least 0 and below 1"):
            weight_norm(nn.Linear(2, 2), direction_drop=p)

    def test_can_be_made_without_memory(self) -> None:
        with torch.device("meta"):
            layer = weight_norm(nn.Conv1d(4, 6, 2), direction_drop=0.4, keep_last_tap=True)
            other = weight_drop(nn.Conv1d(4, 6, 2), p=0.4, keep_last_tap=True)
        assert all(p.is_meta for p in (*layer.parameters(), *other.parameters()))
        assert layer.weight.shape == other.weight.shape == (6, 4, 2)
