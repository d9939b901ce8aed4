from typing import Any

import pytest
import torch
from torch import Tensor

from equilibria import Stopping
from equilibria.models.deq_transformer import DEQTransformerLM, TransformerConfig
from equilibria.models.generation import generate, next_token_log_prob, sample, stream
from equilibria.nn.parametrizations import WeightNorm

V = 11


def make(**options: Any) -> DEQTransformerLM:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"d_model": 16, "n_head": 2, "d_inner": 12, "mem_len": 4}
    config = TransformerConfig(vocab_size=V, **(sizes | options))
    model = DEQTransformerLM(config, stopping=Stopping(rtol=1e-12, atol=0.0, max_evals=200)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        model.inject.weight.mul_(6)
    return model.eval()


def prompt(length: int = 3, batch: int = 2) -> Tensor:
    torch.manual_seed(1)
    return torch.randint(V, (batch, length))


@pytest.mark.parametrize(
    ("options", "window"),
    [
        ({}, None),
        ({}, 3),
        ({}, 1),
        ({}, 100),
        ({"mem_len": 0}, None),
        ({"local_size": 3, "pre_norm": True}, None),
        ({"depth": 3}, None),
        ({"depth": 3, "weight_norm": True}, 3),
    ],
)
def test_one_position_at_a_time_has_the_logits_of_solving_all_again(options, window):
    model, tokens = make(**options), prompt(length=12)  # 12 positions: past the end of most windows
    together = next_token_log_prob(model, tokens, window=window)
    one_by_one = next_token_log_prob(model, tokens, cache=True, window=window)
    assert together.shape == (2, 12, V)
    torch.testing.assert_close(one_by_one, together, rtol=1e-8, atol=1e-8)
    assert together.std() > 1e-2


def test_the_window_is_what_a_position_sees():
    """A change 5 positions earlier does not reach through one layer with a window of 3, but it does through an equilibrium,
    whose field of view grows without limit."""
    tokens = prompt(length=9)
    changed = tokens.clone()
    changed[:, 0] = (tokens[:, 0] + 1) % V

    def difference(model: DEQTransformerLM) -> Tensor:
        return next_token_log_prob(model, tokens, window=3) - next_token_log_prob(model, changed, window=3)

    one_layer = difference(make(depth=1)).abs().amax(dim=(0, 2))
    assert (one_layer[:3] > 1e-6).all()
    assert (one_layer[3:] == 0).all()
    assert (difference(make()).abs().amax(dim=(0, 2))[3:5] > 1e-9).all()


@pytest.mark.parametrize("options", [{}, {"depth": 2}])
@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 0.9, "top_k": 5, "top_p": 0.9}])
def test_text_is_the_same_with_and_without_cache(options, sampling):
    model, start = make(**options), prompt(length=7)  # longer than the window of 5: solved in two pieces
    texts = [
        generate(model, start, max_new_tokens=8, cache=cache, generator=torch.Generator().manual_seed(5), **sampling)
        for cache in (True, False)
    ]
    assert texts[0].shape == (2, 15)
    assert torch.equal(texts[0][:, :7], start)
    assert torch.equal(*texts)


def test_greedy_text_follows_the_logits():
    model = make()
    text = generate(model, prompt(), max_new_tokens=6, temperature=0)
    logits = next_token_log_prob(model, text)
    assert torch.equal(text[:, 3:], logits[:, 2:-1].argmax(-1))


def test_stream_yields_what_generate_returns_as_it_goes():
    model, start = make(), prompt()
    whole = generate(model, start, max_new_tokens=5, generator=torch.Generator().manual_seed(0))
    tokens = stream(model, start, max_new_tokens=5, generator=torch.Generator().manual_seed(0))
    first = next(tokens)
    assert first.shape == (2,)
    assert torch.equal(torch.stack([first, *tokens], dim=1), whole[:, 3:])
    assert torch.equal(generate(model, start, max_new_tokens=0), start)


def test_sampling_draws_from_the_distribution_it_says():
    torch.manual_seed(0)
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().expand(20_000, 4)

    def frequencies(**options: Any) -> Tensor:
        return sample(logits, **options).bincount(minlength=4) / 20_000

    for options, expected in (
        ({}, [0.4, 0.3, 0.2, 0.1]),
        ({"temperature": 0.5}, [16 / 30, 9 / 30, 4 / 30, 1 / 30]),
        ({"top_k": 2}, [4 / 7, 3 / 7, 0, 0]),
        ({"top_k": 9}, [0.4, 0.3, 0.2, 0.1]),
        ({"top_p": 0.65}, [4 / 7, 3 / 7, 0, 0]),
        ({"top_p": 0.75}, [4 / 9, 3 / 9, 2 / 9, 0]),
        ({"top_p": 1e-6}, [1, 0, 0, 0]),
        ({"top_k": 3, "top_p": 0.7}, [4 / 7, 3 / 7, 0, 0]),
        ({"temperature": 0}, [1, 0, 0, 0]),
    ):
        expected = torch.tensor(expected)
        found = frequencies(**options)
        assert (found[expected == 0] == 0).all()
        assert (found - expected).abs().max() < 5 * 0.5 / 20_000**0.5  # five standard deviations


def test_top_p_handles_each_row_in_its_own_order():
    logits = torch.tensor([[0.0, 5.0, 1.0], [5.0, 0.0, 1.0]])
    assert sample(logits, top_p=0.5).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 0.0}, "top_p is 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"max_new_tokens": -1}, "max_new_tokens is -1"),
        ({"window": 0}, "window is 0"),
    ],
)
def test_bad_values_are_refused_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        stream(make(), prompt(), **({"max_new_tokens": 1} | options))


def test_bad_input_is_refused():
    model = make()
    with pytest.raises(ValueError, match="at least one token"):
        generate(model, prompt()[:, :0], max_new_tokens=1)
    with pytest.raises(ValueError, match="knows 0 to 10"):
        generate(model, prompt() + V, max_new_tokens=1)
    with pytest.raises(ValueError, match=r"call model.eval\(\)"):
        generate(model.train(), prompt(), max_new_tokens=1)


@pytest.mark.parametrize("depth", [None, 3])
def test_weights_are_normalised_once_per_token(depth: int | None, monkeypatch: pytest.MonkeyPatch):
    model, calls = make(weight_norm=True, depth=depth), []
    usual = WeightNorm.forward
    monkeypatch.setattr(WeightNorm, "forward", lambda self, g, v: calls.append(1) or usual(self, g, v))
    generate(model, prompt(length=6), max_new_tokens=4)
    assert len(calls) == 4 * 5  # tokens, linear maps


@pytest.mark.parametrize("depth", [None, 3])
def test_distances_are_projected_anew_only_when_the_text_outgrows_them(depth: int | None, monkeypatch: pytest.MonkeyPatch):
    model, counts = make(depth=depth, mem_len=0), []
    usual = model.block.project_distances
    monkeypatch.setattr(model.block, "project_distances", lambda z, count: counts.append(count) or usual(z, count))
    generate(model, prompt(length=3), max_new_tokens=60)
    assert counts == [4, 10, 22, 46, 94]  # each time twice as many as the text just needs
