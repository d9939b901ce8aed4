import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from equilibria.nn import word_loss as module
from equilibria.nn.word_loss import word_loss

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # forward mode
F64 = torch.float64


@pytest.fixture(autouse=True)
def pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two positions, or three words, at a time."""
    monkeypatch.setattr(module, "LOGITS", 24)


def inputs(dtype: torch.dtype = F64, scale: float = 1.0) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    torch.manual_seed(0)
    hidden, weight, bias = (scale * torch.randn(*shape, dtype=dtype) for shape in ((7, 4), (11, 4), (11,)))
    ids = torch.tensor([0, 3, 10, 3, 2, 9, 5])
    return (hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()), ids


def plain(hidden: Tensor, weight: Tensor, bias: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight, bias), ids, reduction="none")


def test_values_and_derivatives_of_both_orders() -> None:
    tensors, ids = inputs()
    assert gradcheck(lambda h, w, b: word_loss(h, w, b, ids), tensors, check_batched_grad=True, check_forward_ad=True)
    assert gradgradcheck(lambda h, w, b: word_loss(h, w, b, ids), tensors)
    torch.testing.assert_close(word_loss(*tensors, ids), plain(*tensors, ids))
    with torch.no_grad():
        torch.testing.assert_close(word_loss(*tensors, ids), plain(*tensors, ids))


@pytest.mark.parametrize("scale", [0.1, 30.0])
def test_float32_is_as_exact_as_the_usual_way(scale: float) -> None:
    """With logits of a few thousand, too, whose exponentials no float holds."""
    tensors, ids = inputs(torch.float32, scale)
    h, w, b = exact = [t.detach().double().requires_grad_() for t in tensors]
    weights = torch.linspace(0.5, 2.0, 7)
    truth = torch.autograd.grad((plain(h, w, b, ids) * weights).sum(), exact)
    for f in (word_loss, plain):
        for found, right in zip(torch.autograd.grad((f(*tensors, ids) * weights).sum(), tensors), truth, strict=True):
            assert (found - right).abs().max() <= 2e-3 * (scale / 30.0) * right.abs().max() + 1e-6


def test_the_logits_of_all_positions_are_never_held(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, ids = inputs()
    largest = 0
    usual = module.affine

    def watched(*args: Tensor) -> Tensor:
        nonlocal largest
        found = usual(*args)
        largest = max(largest, found.numel())
        return found

    monkeypatch.setattr(module, "affine", watched)
    word_loss(*tensors, ids).sum().backward()
    assert 0 < largest <= 44  # a piece of W's gradient; the logits are 77


def test_autocast_and_vmap_take_the_usual_way() -> None:
    (hidden, weight, bias), ids = inputs(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert word_loss(hidden, weight, bias, ids).dtype == torch.float32
    found = torch.func.vmap(lambda h: word_loss(h[None], weight, bias, ids[:1])[0])(hidden)
    torch.testing.assert_close(found, plain(hidden, weight, bias, ids[:1].expand(7)))
