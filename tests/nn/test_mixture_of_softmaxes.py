"""Mixture of softmaxes: the original's recorded probabilities and gradients, the definition, and its dropout."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from recorded import load, read, same, same_gradients, starting_with
from torch import Tensor, nn

from equilibria.nn import FrozenDropout, MixtureOfSoftmaxes

F64 = torch.float64
NAMES = {r"decoder\.": ""}


def mixture(
    n_token: int = 11, d_model: int = 5, d_embed: int = 4, n_experts: int = 3, **options: float
) -> MixtureOfSoftmaxes:
    torch.manual_seed(0)
    return MixtureOfSoftmaxes(n_token, d_model, d_embed, n_experts, init_std=0.7, **options).to(F64)


def probabilities(head: MixtureOfSoftmaxes, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
    """Expert by expert, as they are defined."""
    latent = head.latent(hidden) if mask is None else head.latent(hidden) * mask
    prior = head.prior(hidden).softmax(-1)
    p = torch.zeros(*hidden.shape[:-1], head.n_token, dtype=hidden.dtype)
    for k, vector in enumerate(latent.split(head.d_embed, -1)):
        p = p + prior[..., k, None] * (torch.tanh(vector) @ head.weight.T + head.bias).softmax(-1)
    return p


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_recorded(shared_golden, dtype):
    config, groups = read(shared_golden / "component_mixture_of_softmaxes", dtype)
    for recorded in groups.values():
        params, hidden = starting_with("param.", recorded), recorded["context"].requires_grad_()
        n_token, d_embed = params["decoder.weight"].shape
        assert d_embed == config["ninp"]
        head = MixtureOfSoftmaxes(n_token, hidden.shape[-1], d_embed, config["n_experts"])
        load(head, NAMES, params)
        log_prob = head.log_prob(hidden)
        same(log_prob, recorded["log_prob"])
        same(log_prob.exp() - head.eps, recorded["prob"])
        log_prob.backward(recorded["upstream"])
        gradients = starting_with("grad.", recorded)
        same(hidden.grad, gradients.pop("context"))
        same_gradients(head, NAMES, gradients)


@pytest.mark.parametrize("eps", [0.0, 1e-8, 1e-2])
def test_is_what_is_defined(eps):
    head, hidden = mixture(eps=eps), torch.randn(2, 6, 5, dtype=F64)
    expected = -(probabilities(head, hidden) + eps).log()
    targets = torch.randint(11, (2, 6))
    torch.testing.assert_close(-head.log_prob(hidden), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        head(hidden, targets), expected.gather(-1, targets[..., None])[..., 0], rtol=1e-12, atol=1e-12
    )
    total = head.log_prob(hidden).exp().sum(-1)
    torch.testing.assert_close(total, torch.full_like(total, 1 + 11 * eps), rtol=1e-12, atol=0)


def test_gradients():
    head, hidden = mixture(7, 3, 2, 2), torch.randn(2, 3, 3, dtype=F64, requires_grad=True)
    targets = torch.randint(7, (2, 3))
    names = [name for name, _ in head.named_parameters()]

    def f(hidden: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(head, dict(zip(names, values, strict=True)), (hidden, targets))

    assert torch.autograd.gradcheck(f, (hidden, *head.parameters()))


def test_one_expert_is_one_softmax():
    head, hidden = mixture(n_experts=1, eps=0.0), torch.randn(2, 6, 5, dtype=F64)
    expected = nn.functional.linear(torch.tanh(head.latent(hidden)), head.weight, head.bias).log_softmax(-1)
    torch.testing.assert_close(head.log_prob(hidden), expected, rtol=1e-13, atol=1e-13)


def test_a_hopeless_word_has_the_bound_and_without_eps_its_true_cost():
    for eps, expected in ((1e-8, -math.log(1e-8)), (0.0, 1000.0)):
        head = mixture(n_experts=2, eps=eps)
        with torch.no_grad():
            head.bias[3] = -1000.0
        nll = head(torch.zeros(1, 1, 5, dtype=F64), torch.tensor([[3]]))
        assert nll.item() == pytest.approx(expected, abs=5.0 if eps == 0.0 else 1e-6)
        nll.backward()
        assert all(torch.as_tensor(p.grad).isfinite().all() for p in head.parameters())


def test_latent_is_dropped_before_tanh_for_a_whole_sequence(monkeypatch):
    head, hidden = mixture(dropout=0.5), torch.randn(2, 6, 5, dtype=F64)
    drawn = []
    draw = FrozenDropout.mask
    monkeypatch.setattr(head.drop, "mask", lambda x: drawn.append(draw(head.drop, x)) or drawn[-1])
    found = head.log_prob(hidden)
    assert drawn[0].shape == (2, 1, 12)
    assert set(drawn[0].unique().tolist()) == {0.0, 2.0}
    torch.testing.assert_close(found, (probabilities(head, hidden, drawn[0]) + 1e-8).log(), rtol=1e-12, atol=1e-12)
    head.eval()
    torch.testing.assert_close(head.log_prob(hidden), (probabilities(head, hidden) + 1e-8).log(), rtol=1e-12, atol=1e-12)


def test_tied_weight_stays_tied():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.head = nn.Embedding(11, 4), MixtureOfSoftmaxes(11, 5, 4, 3)
            self.head.tie(self.encoder)

    model = Model()
    for one in (model, copy.deepcopy(model), model.to(F64)):
        assert one.head.weight is one.encoder.weight
    assert "head.weight" not in dict(model.named_parameters())
    with pytest.raises(ValueError, match=r"tables of shapes \[\(11, 5\)\], the softmax weights of shapes \[\(11, 4\)\]"):
        MixtureOfSoftmaxes(11, 5, 4, 3).tie(nn.Embedding(11, 5))


def test_meta_and_bfloat16():
    with torch.device("meta"):
        head = MixtureOfSoftmaxes(1000, 8, 6, 5)
    assert sum(p.numel() for p in head.parameters()) == 1000 * 7 + 5 * 9 + 30 * 9
    head = mixture().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert head.log_prob(torch.randn(2, 6, 5)).dtype == torch.float32


def test_refuses_what_does_not_fit():
    head, hidden = mixture(), torch.randn(2, 6, 5, dtype=F64)
    with pytest.raises(ValueError, match="must be d_model = 5"):
        head.log_prob(hidden[..., :4])
    with pytest.raises(ValueError, match="one target for each position"):
        head(hidden, torch.zeros(2, 5, dtype=torch.int64))
    with pytest.raises(ValueError, match="but the vocabulary has 11 words"):
        head(hidden, torch.full((2, 6), 11))
    with pytest.raises(ValueError, match="eps is -1"):
        mixture(eps=-1.0)
    with pytest.raises(ValueError, match="n_experts must be an integer >= 1"):
        mixture(n_experts=0)
    with pytest.raises(ValueError, match="at least 0 and below 1"):
        mixture(dropout=1.0)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_targets_are_integers_of_any_size(dtype):
    head, hidden, targets = mixture(), torch.randn(2, 6, 5, dtype=F64), torch.randint(11, (2, 6))
    assert torch.equal(head(hidden, targets.to(dtype)), head(hidden, targets))
    with pytest.raises(ValueError, match="vocabulary has 11 words"):
        head(hidden, torch.full((2, 6), 11, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bool, torch.complex64])
def test_targets_are_integers(dtype):
    with pytest.raises(ValueError, match=rf"targets have dtype {dtype}; give the ids of words, as integers"):
        mixture()(torch.randn(2, 6, 5, dtype=F64), torch.ones(2, 6, dtype=dtype))


@pytest.mark.parametrize("shape", [(), (7,), (1, 7), (3, 2, 7)])
def test_dropout_of_a_position_a_sequence_and_batches(shape):
    """One draw per sequence, whose positions are the last dimension but one; a position alone is a sequence of one."""
    head, hidden = mixture(dropout=0.5), torch.randn(*shape, 5, dtype=F64)
    torch.manual_seed(3)
    found = head.log_prob(hidden)
    torch.manual_seed(3)
    mask = head.drop.mask(torch.empty(*shape[:-1], 1, 12, dtype=F64))
    assert mask is not None
    expected = (probabilities(head, hidden, mask.view(12) if not shape else mask) + head.eps).log()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert head(hidden, torch.zeros(shape, dtype=torch.int64)).shape == shape
