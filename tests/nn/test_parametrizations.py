"""Weight norm, bounded spectral norm and dropped connections: what they compute, and what they promise to a solve."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from problems import normal, orthogonal
from steps import iterates
from torch import Tensor, nn
from torch.nn.utils import parametrizations as torch_parametrizations

from equilibria import DEQ, Implicit, Picard, RandomMapError, Stopping, fixed_point
from equilibria.nn import FrozenDropout, spectral_norm, stack, weight_drop, weight_norm

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

TIGHT = Stopping(rtol=1e-13, atol=1e-15, max_evals=400)


def linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
    return layer


def parts(layer: Any, name: str = "weight") -> Any:
    return layer.parametrizations[name]


def with_values(*values: float) -> Tensor:
    """A square matrix with these singular values."""
    n = len(values)
    return orthogonal(n, 1) @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ orthogonal(n, 2)


class Cell(nn.Module):
    """tanh(W z + x)"""

    inner: Any

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(z) + x)


class TestWeightNorm:
    @pytest.mark.parametrize("dim", [0, 1, -1, None])
    def test_changes_nothing_at_first_and_separates_length_from_direction(self, dim: int | None) -> None:
        weight = normal(0, 3, 4)
        layer = weight_norm(linear(weight), dim=dim)
        assert torch.allclose(layer.weight, weight, rtol=1e-15)
        g, v = parts(layer).original0, parts(layer).original1
        others = (0, 1) if dim is None else (1 - dim % 2,)
        assert g.shape == weight.norm(dim=others, keepdim=True).shape
        with torch.no_grad():
            v.mul_(3.0)
            g.mul_(2.0)
        assert torch.allclose(layer.weight, 2 * weight, rtol=1e-14)

    def test_agrees_with_torch_and_its_state_dict(self) -> None:
        mine = weight_norm(linear(normal(0, 3, 4)))
        theirs: Any = torch_parametrizations.weight_norm(linear(normal(1, 3, 4)))
        mine.load_state_dict(theirs.state_dict())
        assert torch.allclose(mine.weight, theirs.weight, rtol=1e-15)
        found, expected = (torch.autograd.grad(one.weight.sin().sum(), list(one.parameters())) for one in (mine, theirs))
        assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-14) for a, b in zip(found, expected, strict=True))

    @pytest.mark.parametrize("shape", [(3,), (3, 4), (3, 2, 5)])
    def test_derivatives_of_every_kind(self, shape: tuple[int, ...]) -> None:
        module = nn.Module()
        module.weight = nn.Parameter(normal(0, *shape))
        part = parts(weight_norm(module))
        inputs = [tensor.detach().clone().requires_grad_() for tensor in (part.original0, part.original1)]
        assert torch.autograd.gradcheck(part[0], inputs, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(part[0], inputs)

    def test_a_row_of_zeros_stays_zero_and_learns(self) -> None:
        weight = normal(0, 3, 4)
        weight[1] = 0
        layer = weight_norm(linear(weight))
        assert torch.allclose(layer.weight, weight, rtol=1e-15)
        of_g, of_v = torch.autograd.grad((layer.weight * normal(1, 3, 4)).sum(), list(layer.parameters()))
        assert of_g[1].abs() > 0
        assert of_g.isfinite().all()
        assert of_v.isfinite().all()

    def test_a_recurrent_cell(self) -> None:
        cell = nn.GRUCell(3, 4).double()
        x, z = normal(0, 2, 3), normal(1, 2, 4)
        expected = cell(x, z)
        assert torch.allclose(weight_norm(cell, "weight_hh")(x, z), expected, rtol=1e-13)

    def test_misuse(self) -> None:
        with pytest.raises(ValueError, match="Linear has no tensor `weights`"):
            weight_norm(nn.Linear(2, 2), "weights")
        with pytest.raises(ValueError, match=r"dim is 2, but weight has shape \(2, 2\)"):
            weight_norm(nn.Linear(2, 2), dim=2)


class TestSpectralNorm:
    @pytest.mark.parametrize(("largest", "expected"), [(3.0, 0.9), (0.9, 0.9), (0.5, 0.5)])
    def test_bounds_the_norm_and_leaves_small_weights_alone(self, largest: float, expected: float) -> None:
        weight = with_values(largest, 0.4 * largest, 0.1)
        layer = spectral_norm(linear(weight), bound=0.9)
        found = layer.weight
        assert abs(torch.linalg.matrix_norm(found, 2).item() - expected) < 1e-12
        assert torch.allclose(found, weight * (expected / largest), rtol=1e-11, atol=1e-14)

    def test_rescale_makes_the_norm_equal_to_the_bound(self) -> None:
        layer = spectral_norm(linear(with_values(0.3, 0.1)), bound=0.9, rescale=True)
        assert abs(torch.linalg.matrix_norm(layer.weight, 2).item() - 0.9) < 1e-12

    @pytest.mark.parametrize("ratio", [0.5, 0.9, 0.99])
    @pytest.mark.parametrize("iterations", [1, 5, 20])
    def test_accuracy_is_as_stated(self, ratio: float, iterations: int) -> None:
        """1 - σ_k / σ <= r^(4k + 2) tan²θ, from a start at a known angle."""
        left = orthogonal(2, 1)
        layer = spectral_norm(linear(with_values(2.0, 2.0 * ratio)), n_power_iterations=iterations)
        angle = 1.0
        parts(layer)[0].u.copy_(left @ torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64))
        estimated = 2.0 / torch.linalg.matrix_norm(layer.weight, 2).item()  # σ_k = 2 / ‖W min(1, 1/σ_k)‖
        error = 1 - estimated / 2.0
        assert -1e-14 < error <= ratio ** (4 * iterations + 2) * math.tan(angle) ** 2 + 1e-14
        if ratio == 0.9 and iterations == 1:
            assert error > 0.01  # the bound is not met for nothing

    def test_picard_contracts_at_the_bound(self) -> None:
        """‖z_{k+1} - z_k‖ <= 0.9 ‖z_k - z_{k-1}‖ in every sample and step, whatever the weight was before."""
        layer = spectral_norm(linear(20 * with_values(1.0, 0.6, 0.5, 0.4)), bound=0.9)
        cell, x = Cell(layer), 0.05 * normal(5, 6, 4)
        with torch.no_grad():
            visited = iterates(Picard(), lambda z: cell.eval()(z, x), normal(6, 6, 4), 30)
        differences = torch.stack([(b - a).norm(dim=1) for a, b in pairwise(visited)])
        assert (differences[1:] <= 0.9 * (1 + 1e-12) * differences[:-1] + 1e-16).all()
        _, stats = DEQ(cell, solver=Picard(), stopping=TIGHT)(x)
        assert stats.converged.all()
        # Without the bound the same weight has no such rate.
        wild = linear(20 * with_values(1.0, 0.6, 0.5, 0.4))
        small = 1e-3 * normal(7, 6, 4)
        assert (wild(small).tanh().norm(dim=1) > small.norm(dim=1)).any()

    def test_the_exact_bound_holds_while_training_presses_against_it(self) -> None:
        torch.manual_seed(0)
        cell = Cell(spectral_norm(nn.Linear(6, 6).double(), bound=0.9, n_power_iterations=None))
        deq = DEQ(cell, adjoint=Implicit(stopping=TIGHT), stopping=TIGHT)
        optimizer = torch.optim.SGD(deq.parameters(), lr=0.5)
        x = normal(1, 8, 6)
        values = torch.zeros(2)
        for _ in range(60):
            loss = -deq(x).z.square().mean()  # pulls the norm up
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            values = torch.linalg.svdvals(cell.inner.weight)
            assert values[0] <= 0.9 * (1 + 1e-12)
        assert torch.linalg.svdvals(parts(cell.inner).original)[1] > 0.85  # two singular values press
        assert torch.linalg.matrix_norm(parts(cell.inner).original, 2) > 0.95  # what the weight would have grown to

    def test_estimate_catches_up_when_a_weight_jumps(self) -> None:
        """A training solve each brings it nearer; evaluation does not."""
        weight = with_values(1.0, 0.7, 0.1)
        layer = spectral_norm(linear(weight), bound=0.9)
        with torch.no_grad():
            parts(layer).original.copy_(4 * orthogonal(3, 5) @ weight)
        layer.eval()
        first, again = (torch.linalg.matrix_norm(layer.weight, 2).item() for _ in range(2))
        assert first == again > 0.95
        layer.train()
        norms = [torch.linalg.matrix_norm(layer.weight, 2).item() for _ in range(12)]
        assert all(b <= a for a, b in pairwise(norms))
        assert abs(norms[-1] - 0.9) < 1e-9

    def test_writes_in_training_mode_alone_and_not_under_transforms(self) -> None:
        layer = spectral_norm(linear(normal(0, 4, 4)), n_power_iterations=2)
        parts(layer)[0].u.copy_(torch.nn.functional.normalize(normal(3, 4), dim=0))
        before = parts(layer)[0].u.clone()
        torch.func.grad(lambda w: parts(layer)[0](w).sum())(normal(1, 4, 4))
        assert torch.equal(parts(layer)[0].u, before)
        assert layer.eval().weight is not None
        assert torch.equal(parts(layer)[0].u, before)
        assert layer.train().weight is not None
        assert not torch.equal(parts(layer)[0].u, before)

    def test_derivatives_are_those_of_the_estimate(self) -> None:
        """Checked where the power iteration is far from converged, and above as well as below the bound."""
        for scale in (1.0, 0.1):
            part = parts(spectral_norm(linear(normal(0, 4, 3)), bound=0.9).eval())[0]
            part.u.copy_(torch.nn.functional.normalize(normal(3, 4), dim=0))
            weight = (scale * normal(2, 4, 3)).requires_grad_()
            assert torch.autograd.gradcheck(part, weight, check_forward_ad=True)
            assert torch.autograd.gradgradcheck(part, weight)
        part = parts(spectral_norm(linear(normal(0, 4, 3)), bound=0.9, n_power_iterations=None))[0]
        weight = normal(2, 4, 3).requires_grad_()
        assert torch.autograd.gradcheck(part, weight, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(part, weight)

    def test_an_earlier_graph_survives_later_training_solves(self) -> None:
        layer = spectral_norm(linear(normal(0, 4, 4))).eval()
        first = layer.weight
        assert layer.train().weight is not None
        first.sum().backward()

    def test_a_zero_weight_and_a_kernel_of_a_convolution(self) -> None:
        zero = spectral_norm(linear(torch.zeros(3, 3, dtype=torch.float64)))
        zero.weight.sum().backward()
        assert parts(zero).original.grad.isfinite().all()
        conv = spectral_norm(nn.Conv1d(4, 5, 3).double(), bound=0.2)
        assert torch.linalg.matrix_norm(conv.weight.flatten(1), 2) < 0.2 * 1.01

    def test_low_precision_measures_in_float32(self) -> None:
        layer = spectral_norm(linear(with_values(3.0, 1.0, 0.5)).to(torch.bfloat16), bound=0.5)
        assert layer.weight.dtype == torch.bfloat16
        assert abs(torch.linalg.matrix_norm(layer.weight.float(), 2).item() - 0.5) < 0.5 * 2**-7
        layer = spectral_norm(linear(with_values(3.0, 1.0, 0.5)).float(), bound=0.5)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            weight = layer.weight
        assert abs(torch.linalg.matrix_norm(weight, 2).item() - 0.5) < 1e-6

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"bound": 0.0}, "bound is 0.0"),
            ({"bound": float("nan")}, "bound is nan"),
            ({"n_power_iterations": 0}, "n_power_iterations is 0; give 1 or more, or None"),
            ({"name": "bias"}, r"bias has shape \(2,\); a spectral norm needs a matrix"),
            ({"name": "w"}, "Linear has no tensor `w`"),
        ],
    )
    def test_misuse(self, options: dict[str, Any], words: str) -> None:
        with pytest.raises(ValueError, match=words):
            spectral_norm(nn.Linear(2, 2), **options)

    def test_zero_cannot_be_rescaled(self) -> None:
        with pytest.raises(ValueError, match=r"weight is zero and cannot be rescaled to norm 1.0"):
            spectral_norm(linear(torch.zeros(2, 2)), rescale=True)


class TestWeightDrop:
    def test_one_mask_per_solve_forward_and_backward(self) -> None:
        """Each solve is that of some masked weight, its gradient is that for this mask, and the next has another."""
        torch.manual_seed(0)
        weight, x = 0.15 * normal(0, 6, 6), normal(1, 3, 6)
        cell = Cell(weight_drop(linear(weight), p=0.4))
        deq = DEQ(cell, stopping=TIGHT, adjoint=Implicit(stopping=TIGHT))
        seen = []
        for _ in range(3):
            z, stats = deq(x)
            assert stats.converged.all()
            (gradient,) = torch.autograd.grad(z.square().sum(), parts(cell.inner).original)
            dropped = gradient == 0  # as the weight was
            masked = torch.where(dropped, 0, weight / 0.6)
            assert torch.allclose(torch.tanh(z @ masked.T + x), z, rtol=1e-11)
            assert 0 < dropped.sum() < 36
            seen.append(dropped)
        assert not torch.equal(seen[0], seen[1])
        assert not torch.equal(seen[1], seen[2])

    def test_gradient_is_that_of_the_masked_weight(self) -> None:
        weight, x = 0.15 * normal(0, 6, 6), normal(1, 3, 6)
        cell = Cell(weight_drop(linear(weight), p=0.4))
        z = DEQ(cell, stopping=TIGHT, adjoint=Implicit(stopping=TIGHT))(x).z
        (gradient,) = torch.autograd.grad(z.square().sum(), parts(cell.inner).original)
        mask = (gradient != 0).double() / 0.6

        def f(z: Tensor, W: Tensor) -> Tensor:
            return torch.tanh(z @ (mask * W).T + x)

        W = weight.clone().requires_grad_()
        other = fixed_point(f, torch.zeros_like(x), W, stopping=TIGHT, adjoint=Implicit(stopping=TIGHT)).z
        assert torch.allclose(gradient, torch.autograd.grad(other.square().sum(), W)[0], rtol=1e-9, atol=1e-12)

    def test_expectation_is_the_weight(self) -> None:
        torch.manual_seed(0)
        n, p = 4000, 0.3
        weight = normal(0, 3, 3)
        layer = weight_drop(linear(weight), p=p)
        with torch.no_grad():
            mean = torch.stack([layer.weight for _ in range(n)]).mean(0)
        deviation = weight.abs() * math.sqrt(p / (1 - p) / n)
        assert ((mean - weight).abs() < 5 * deviation).all()

    def test_nothing_in_evaluation_mode_or_with_p_zero(self) -> None:
        weight = normal(0, 6, 6)
        assert torch.equal(weight_drop(linear(weight), p=0.5).eval().weight, weight)
        assert torch.equal(weight_drop(linear(weight), p=0.0).weight, weight)

    def test_one_mask_for_all_layers_of_a_stack(self) -> None:
        torch.manual_seed(0)
        cell, x = Cell(weight_drop(linear(normal(0, 4, 4)), p=0.5)), normal(1, 2, 4)
        torch.manual_seed(1)
        found = stack(cell, 3, x)
        torch.manual_seed(1)
        weight = cell.inner.weight
        z = torch.zeros_like(x)
        for _ in range(3):
            z = torch.tanh(z @ weight.T + x)
        assert torch.equal(found, z)

    def test_after_weight_norm_and_under_a_bound(self) -> None:
        torch.manual_seed(0)
        layer = spectral_norm(weight_drop(weight_norm(linear(normal(0, 6, 6))), p=0.5), bound=0.9, n_power_iterations=60)
        assert set(dict(layer.named_parameters())) == {
            "parametrizations.weight.original0",
            "parametrizations.weight.original1",
        }
        for _ in range(5):
            weight = layer.weight
            assert (weight == 0).any()
            assert torch.linalg.matrix_norm(weight, 2) <= 0.9 * (1 + 1e-6)

    def test_outside_of_a_deq_the_randomness_is_found(self) -> None:
        cell, x = Cell(weight_drop(linear(0.1 * normal(0, 4, 4)))), normal(1, 2, 4)
        with pytest.raises(RandomMapError, match="draws random numbers"):
            fixed_point(cell, torch.zeros_like(x), x)

    def test_registration_draws_no_random_number(self) -> None:
        layer = nn.Linear(4, 4)
        state = torch.get_rng_state()
        weight_drop(layer)
        assert torch.equal(torch.get_rng_state(), state)

    @pytest.mark.parametrize("p", [-0.1, 1.0, float("nan")])
    def test_impossible_probability(self, p: float) -> None:
        with pytest.raises(ValueError, match="at least 0 and below 1"):
            weight_drop(nn.Linear(2, 2), p=p)

    def test_by_hand_in_prepare(self) -> None:
        """FrozenDropout does the same for a block that passes its weights as args."""

        class ByHand(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner, self.drop = linear(0.15 * normal(0, 6, 6)), FrozenDropout(0.4)

            def prepare(self, x: Tensor) -> tuple[Tensor, Tensor]:
                weight = self.inner.weight
                return x, self.drop(weight, self.drop.mask(weight))

            def forward(self, z: Tensor, x: Tensor, weight: Tensor) -> Tensor:
                return torch.tanh(z @ weight.T + x)

        x = normal(1, 3, 6)
        automatic = Cell(weight_drop(linear(0.15 * normal(0, 6, 6)), p=0.4))
        found = []
        for block in (ByHand(), automatic):
            torch.manual_seed(3)
            z = DEQ(block, stopping=TIGHT)(x).z
            found.append((z, *torch.autograd.grad(z.sum(), list(block.parameters()))))
        assert torch.equal(found[0][0], found[1][0])
        assert torch.allclose(found[0][1], found[1][1], rtol=1e-12)
