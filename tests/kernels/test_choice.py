"""Without a GPU, or without being asked, everything is done by the references."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from equilibria.kernels import choice
from equilibria.kernels.history import combine, dots, store_dots

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own


def test_a_cpu_gets_the_reference(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(choice, "ASKED", True)
    monkeypatch.setattr(choice, "INTERPRETED", False)
    assert not choice.fused(torch.ones(2, 3))


def test_a_process_that_does_not_ask_gets_the_reference(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(choice, "ASKED", False)
    monkeypatch.setattr(choice, "INTERPRETED", True)
    assert not choice.fused(torch.ones(2, 3))


@pytest.mark.skipif(not choice.installed(), reason="the choice is made only where Triton is installed")
def test_only_plain_filled_tensors_of_a_known_dtype_are_fused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(choice, "ASKED", True)
    monkeypatch.setattr(choice, "INTERPRETED", True)
    some = torch.ones(2, 3)

    class Own(torch.Tensor):
        pass

    assert choice.fused(some, some.double())
    assert choice.fused(torch.nn.Parameter(some))
    for other in (some[:0], some.int(), some.as_subclass(Own), some.to("meta"), torch.complex(some, some).conj().imag):
        assert not choice.fused(some, other)
    seen = []
    torch.vmap(lambda t: seen.append(choice.fused(t)) or t)(some)
    torch.func.jvp(lambda t: seen.append(choice.fused(t)) or t, (some,), (some,))
    torch.func.grad(lambda t: seen.append(choice.fused(t)) or t.sum())(some)
    with torch.autograd.forward_ad.dual_level():
        seen.append(choice.fused(some))
    root = some.clone().requires_grad_()
    twice = root * 2
    grads = torch.stack([some, some])
    twice.register_hook(lambda grad: seen.append(choice.fused(grad)))
    torch.autograd.grad(twice, root, grads, is_grads_batched=True)
    assert seen == [False] * 5


def test_what_is_recorded_is_not_fused_without_a_derivative(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(choice, "ASKED", True)
    monkeypatch.setattr(choice, "INTERPRETED", True)
    monkeypatch.setattr(choice, "installed", lambda: True)
    followed = torch.ones(2, 3, requires_grad=True)
    assert choice.fused(followed)
    assert not choice.fused_unrecorded(torch.ones(2), followed)
    with torch.no_grad():
        assert choice.fused_unrecorded(torch.ones(2), followed)


def test_the_references_stand_in_for_kernels_that_are_not_there(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(choice, "ASKED", True)
    monkeypatch.setattr(choice, "INTERPRETED", True)
    monkeypatch.setattr(choice, "installed", lambda: False)
    monkeypatch.setitem(sys.modules, "triton", None)  # an import would raise
    history, v = torch.randn(2, 4, 5), torch.randn(2, 5)
    torch.testing.assert_close(dots(history, v), torch.einsum("bmd,bd->bm", history, v))
    weights = torch.randn(2, 4)
    torch.testing.assert_close(combine(v, weights, history), v - torch.einsum("bm,bmd->bd", weights, history))
    assert store_dots(history, 5, v, v, v)[1][:, 1].eq(0).all()


@pytest.mark.skipif(not choice.installed(), reason="Triton is not installed here")
def test_triton_is_found_on_this_platform():
    import triton

    assert Path(triton.__file__).is_file()
