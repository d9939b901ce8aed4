"""Where a result would be wrong without anyone noticing, there is an error, or the right result."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import affine_map, normal, orthogonal, tanh_map
from torch import Tensor, nn

from equilibria import (
    DEQ,
    GMRES,
    Anderson,
    Implicit,
    NewtonKrylov,
    Picard,
    Status,
    Stopping,
    Unrolled,
    fixed_point,
)
from equilibria.diagnostics import backward_condition, spectral_radius
from equilibria.nn import MonotoneBlock, MonotoneDEQ, spectral_norm
from equilibria.regularizers import Recording, jacobian_loss

W = 0.8 * orthogonal(6)


class TestMixedSamples:
    """A map that takes dimension 0 for something else than the batch: one gradient for each sample does not exist."""

    @pytest.mark.parametrize("f", [affine_map, tanh_map], ids=["affine", "tanh"])
    def test_an_unbatched_state(self, f: Any) -> None:
        b = normal(0, 6).requires_grad_()
        stopping = Stopping(rtol=1e-8, max_evals=500)
        z = fixed_point(lambda z, b: f(z.unsqueeze(0), W, b).squeeze(0), torch.zeros(6).double(), b, stopping=stopping).z
        with pytest.raises(ValueError, match=r"f mixes samples. Dimension 0 .* z0.unsqueeze\(0\)"):
            z.sum().backward()

    def test_through_torch_func(self) -> None:
        def layer(b: Tensor) -> Tensor:
            stopping = Stopping(rtol=1e-8, max_evals=500)
            return fixed_point(lambda z, b: torch.tanh(W @ z + b), torch.zeros(6).double(), b, stopping=stopping).z

        with pytest.raises(ValueError, match="f mixes samples"):
            torch.func.jacrev(layer)(normal(0, 6))

    def test_rounding_is_not_taken_for_it(self) -> None:
        """J is half the identity, but by way of a map as badly conditioned as can be: its products are rounded far off."""
        scales, turn = torch.logspace(-4, 4, 6).double(), orthogonal(6)
        there = ((turn * scales) @ turn).float()
        back = 0.5 * ((turn / scales) @ turn).mT.float()
        b = normal(0, 4, 6).float().requires_grad_()
        z = fixed_point(lambda z, b: (z @ there) @ back + b, torch.zeros(4, 6), b)
        (found,) = torch.autograd.grad(z.z.sum(), b)
        assert bool(found.isfinite().all())
        (backward,) = z.stats.backward
        assert bool((backward.relative > 1e-2).any())  # the test is of no use otherwise
        assert not bool(backward.converged.all())

    def test_the_same_as_one_sample(self) -> None:
        b = normal(0, 1, 6).requires_grad_()
        tight = Stopping(rtol=1e-12, max_evals=500)
        z, stats = fixed_point(affine_map, 0 * b.detach(), W, b, stopping=tight, adjoint=Implicit(stopping=tight))
        (found,) = torch.autograd.grad(z.sum(), b)
        expected = torch.linalg.solve((torch.eye(6).double() - W).mT, torch.ones(6).double())
        assert torch.allclose(found[0], expected, rtol=1e-9)
        assert stats.backward[0].converged.all()


@pytest.mark.parametrize(
    "look",
    [
        lambda f, z: spectral_radius(f, z),
        lambda f, z: backward_condition(f, z),
        lambda f, z: jacobian_loss(f, z),
        lambda f, z: fixed_point(lambda z: 3 * z + 1, z, solver=NewtonKrylov()),
    ],
    ids=["spectral radius", "condition", "jacobian loss", "newton"],
)
def test_inference_mode_is_no_constant(look: Any) -> None:
    """Autograd records nothing there, and every map would look like a constant."""
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"use torch.no_grad\(\) instead"):
        look(lambda z: z @ W, torch.zeros(2, 6).double())


@pytest.mark.parametrize("solver", [NewtonKrylov(), GMRES(), Anderson(), Picard()], ids=repr)
def test_a_sample_at_rest_does_not_spoil_the_gradient_of_others(solver: Any) -> None:
    weight, x = W.clone().requires_grad_(), normal(0, 3, 6)
    x[1] = 0
    f = affine_map if isinstance(solver, GMRES) else tanh_map
    options: Any = {"solver": solver, "stopping": Stopping(rtol=1e-10, max_evals=200)}
    z = fixed_point(f, torch.zeros(3, 6).double(), weight, x, adjoint=Unrolled(), **options).z
    (found,) = torch.autograd.grad(z.sum(), weight)
    z = fixed_point(f, torch.zeros(3, 6).double(), weight, x, adjoint=Implicit(stopping=Stopping(rtol=1e-12)), **options).z
    assert torch.allclose(found, torch.autograd.grad(z.sum(), weight)[0], rtol=1e-6, atol=1e-8)


def test_a_weight_that_was_zero_is_bounded_when_it_has_grown() -> None:
    linear = nn.Linear(8, 8, bias=False)
    nn.init.zeros_(linear.weight)
    spectral_norm(linear, bound=0.5)
    with torch.no_grad():
        linear.parametrizations.weight.original.copy_(normal(0, 8, 8))  # type: ignore[union-attr, operator]
        weights = [linear.weight for _ in range(20)]  # each reading goes on with the power iteration
    assert float(torch.linalg.matrix_norm(weights[-1], 2)) == pytest.approx(0.5, rel=1e-3)


def test_a_recording_keeps_z0_as_it_was() -> None:
    z0, recording = torch.zeros(2, 3), Recording(Picard(), at=(0, 1))

    def f(z: Tensor) -> Tensor:
        return 0.5 * z + 1

    solution = fixed_point(f, z0, solver=recording)
    z0.fill_(100.0)
    assert torch.equal(recording.states(f, solution)[0], torch.ones(2, 3))


def test_newton_on_a_compiled_map() -> None:
    def f(z: Tensor, W: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(z @ W.mT + x)

    x = normal(0, 3, 6)
    options: Any = {"solver": NewtonKrylov(), "stopping": Stopping(rtol=1e-10)}
    compiled = torch.compile(f, backend="aot_eager")
    with torch.no_grad():
        assert torch.allclose(fixed_point(compiled, 0 * x, W, x, **options).z, fixed_point(f, 0 * x, W, x, **options).z)


def test_a_monotone_layer_may_return_what_failed() -> None:
    x = normal(0, 2, 3).float()
    x[1] = float("nan")
    stats = MonotoneDEQ(MonotoneBlock(3, 8), raise_nonfinite=False)(x).stats
    assert stats.status.tolist() == [Status.CONVERGED, Status.NONFINITE]


def test_a_method_need_not_use_all_that_its_module_owns() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))
            self.inner = nn.Linear(3, 3)

        def step(self, z: Tensor, x: Tensor) -> Tensor:
            return torch.tanh(0.3 * self.inner(z) + x)

    model, x = Model(), torch.randn(4, 3)
    z = fixed_point(model.step, torch.zeros(4, 3), model.encoder(x)).z
    z.sum().backward()
    assert model.inner.weight.grad is not None
    with pytest.raises(ValueError, match="BatchNorm1d in training mode"):
        DEQ(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, track_running_stats=False)).eval())(x)
