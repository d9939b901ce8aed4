"""Equilibria with parametrised weights: copied, averaged, saved and loaded."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import normal
from torch import Tensor, nn
from torch.nn.utils import parametrizations as torch_parametrizations
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from equilibria import DEQ, Implicit, Stopping
from equilibria.nn import BoundedInjection, spectral_norm, weight_drop, weight_norm

TIGHT = Stopping(rtol=1e-12, atol=1e-14, max_evals=200)
X = normal(0, 5, 3)

WRAPS: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "weight norm": weight_norm,
    "spectral norm": lambda linear: spectral_norm(linear, bound=0.8),
    "dropped weight norm": lambda linear: weight_drop(weight_norm(linear), p=0.3),
    "weight norm of a dropped direction": lambda linear: weight_norm(linear, direction_drop=0.3),
    "torch weight norm": torch_parametrizations.weight_norm,
    "torch spectral norm": torch_parametrizations.spectral_norm,
    "torch orthogonal": torch_parametrizations.orthogonal,
}


class Block(nn.Module):
    """tanh(0.5 W z + U x), W parametrised."""

    inner: Any

    def __init__(self, wrap: Callable[[nn.Linear], nn.Module]) -> None:
        super().__init__()
        self.inner = wrap(nn.Linear(4, 4).double())
        self.outer = BoundedInjection(3, 4).double()

    def prepare(self, x: Tensor) -> tuple[Tensor]:
        return (self.outer(x),)

    def initial(self, x: Tensor) -> Tensor:
        return x.new_zeros(len(x), 4)

    def forward(self, z: Tensor, u: Tensor) -> Tensor:
        return torch.tanh(0.5 * self.inner(z) + u)


def make(wrap: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return DEQ(Block(WRAPS[wrap]), stopping=TIGHT, adjoint=Implicit(stopping=TIGHT)).eval()


def through_a_file(value: Any, *, weights_only: bool) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


def gradients(deq: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(deq(X).z.square().sum(), list(deq.parameters())))


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("wrap", WRAPS)
class TestEach:
    @pytest.mark.parametrize("used", [False, True], ids=["fresh", "after a backward pass"])
    def test_deepcopy_is_independent(self, wrap: str, used: bool) -> None:
        deq = make(wrap)
        if used:
            deq.train()(X).z.sum().backward()
            deq.eval()
        twin = copy.deepcopy(deq)
        assert torch.equal(twin(X).z, deq(X).z)
        assert same(gradients(twin), gradients(deq))
        before = [None if p.grad is None else p.grad.clone() for p in deq.parameters()]
        twin(X).z.square().sum().backward()
        for parameter, old in zip(deq.parameters(), before, strict=True):
            assert (parameter.grad is None) == (old is None)
            assert old is None or torch.equal(parameter.grad, old)  # pyright: ignore[reportArgumentType]
        assert not {p.data_ptr() for p in deq.parameters()} & {p.data_ptr() for p in twin.parameters()}
        z = deq(X).z
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.mul_(-0.5)
        assert torch.equal(deq(X).z, z)
        assert not torch.allclose(twin(X).z, z)

    def test_state_dict_through_a_file(self, wrap: str) -> None:
        deq, other = make(wrap), make(wrap, seed=1)
        assert not torch.allclose(deq(X).z, other(X).z)
        state = through_a_file(deq.state_dict(), weights_only=True)
        missing = other.load_state_dict(state)
        assert not missing.missing_keys
        assert not missing.unexpected_keys
        assert torch.equal(other(X).z, deq(X).z)

    def test_whole_through_a_file(self, wrap: str) -> None:
        deq = make(wrap).train()
        deq(X).z.sum().backward()
        deq.eval()
        loaded = through_a_file(deq, weights_only=False)
        assert isinstance(loaded.block.inner, nn.Linear)
        assert isinstance(loaded.block.outer, BoundedInjection)
        assert list(loaded.state_dict()) == list(deq.state_dict())
        assert torch.equal(loaded(X).z, deq(X).z)
        assert same(gradients(loaded), gradients(deq))
        again = copy.deepcopy(through_a_file(loaded, weights_only=False))
        assert torch.equal(again(X).z, deq(X).z)

    def test_exponential_moving_average(self, wrap: str) -> None:
        deq = make(wrap)
        average = AveragedModel(deq, multi_avg_fn=get_ema_multi_avg_fn(0.5))
        average.update_parameters(deq)  # the first is taken whole
        before = [p.detach().clone() for p in deq.parameters()]
        with torch.no_grad():
            for parameter in deq.parameters():
                parameter.add_(0.1)
        average.update_parameters(deq)
        for old, mean in zip(before, average.module.parameters(), strict=True):
            assert torch.allclose(mean, old + 0.05, rtol=1e-12, atol=1e-15)
        z, stats = average(X)
        assert stats.converged.all()
        assert not torch.allclose(z, deq(X).z)


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("other", ["copy", "original"])
def test_parametrisation_is_removed_from_one_alone(wrap: str, other: str) -> None:
    """As for export: the copy (an average, say) becomes plain, and the model goes on training."""
    deq = make(wrap)
    z = deq(X).z
    pair = deq, copy.deepcopy(deq)
    plain, kept = pair[::-1] if other == "copy" else pair
    parametrize.remove_parametrizations(plain.block.inner, "weight")
    assert type(plain.block.inner) is nn.Linear
    assert torch.allclose(plain(X).z, z, rtol=1e-9, atol=1e-11)
    assert torch.equal(kept(X).z, z)
    assert parametrize.is_parametrized(kept.block.inner)
    assert torch.equal(copy.deepcopy(kept)(X).z, z)


def test_a_loaded_module_is_still_parametrised() -> None:
    loaded = through_a_file(make("weight norm"), weights_only=False)
    layer = loaded.block.inner
    assert parametrize.is_parametrized(layer, "weight")
    weight = layer.weight.detach().clone()
    with torch.no_grad():
        layer.parametrizations.weight.original0.mul_(2.0)
    assert torch.allclose(layer.weight, 2 * weight)
    parametrize.remove_parametrizations(layer, "weight")
    assert type(layer) is nn.Linear
    assert torch.allclose(layer.weight, 2 * weight)


def test_layers_outside_of_an_equilibrium_can_be_saved_too() -> None:
    layer = nn.Sequential(weight_norm(nn.GRUCell(3, 4), "weight_hh"), nn.Tanh())
    loaded = through_a_file(layer, weights_only=False)
    x = torch.randn(2, 3)
    assert torch.equal(loaded(x), layer(x))


def test_a_layer_that_torch_parametrised_alone_says_what_to_do() -> None:
    with pytest.raises(RuntimeError, match=r"only supported through state_dict\(\)"):
        torch.save(torch_parametrizations.weight_norm(nn.Linear(2, 2)), io.BytesIO())
