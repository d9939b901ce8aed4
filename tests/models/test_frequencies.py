"""Models that begin with the frequencies of words, with every kind of softmax."""

from typing import Any

import pytest
import torch

from equilibria.models import DEQTransformerLM, DEQTrellisNetLM, EquilibriumLM, TransformerConfig, TrellisConfig
from equilibria.models.frequencies import start_from_frequencies

V = 12
COUNTS = torch.tensor([500, 300, 200, 100, 90, 80, 60, 30, 10, 5, 1, 0])
P = (COUNTS + 1) / (COUNTS.sum() + V)


def trellis(**options: Any) -> EquilibriumLM:
    return DEQTrellisNetLM(TrellisConfig(vocab_size=V, d_embed=4, d_hidden=4, d_output=4, **options))


def transformer(**options: Any) -> EquilibriumLM:
    return DEQTransformerLM(TransformerConfig(vocab_size=V, d_model=8, n_head=2, d_inner=8, **options))


@pytest.mark.parametrize(
    "model",
    [
        trellis(),
        trellis(cutoffs=(3, 7)),
        trellis(n_experts=2),
        transformer(),
        transformer(cutoffs=(3, 7)),
        transformer(cutoffs=(3, 7), div_val=2, d_embed=8),
    ],
)
def test_words_begin_with_their_frequencies(model):
    start_from_frequencies(model, COUNTS)
    width = model.softmax.d_model if hasattr(model.softmax, "d_model") else model.softmax.clusters.d_model
    log_p = model.softmax.log_prob(torch.zeros(2, 3, width))
    torch.testing.assert_close(log_p, P.log().expand(2, 3, V), rtol=1e-4, atol=1e-4)
    nll = model.softmax(torch.zeros(1, V, width), torch.arange(V)[None])
    torch.testing.assert_close(nll[0], -P.log(), rtol=1e-4, atol=1e-4)


def test_a_fresh_model_has_the_entropy_of_the_words_as_its_loss():
    torch.manual_seed(0)
    model = trellis(init_std=1e-3, inject_std=1e-3).eval()
    start_from_frequencies(model, COUNTS)
    tokens = torch.multinomial(P, 4000, replacement=True).view(4, 1000)
    entropy = -(P * P.log()).sum()
    assert abs(model(tokens, tokens).nll.mean() - entropy) < 0.05


@pytest.mark.parametrize("counts", [COUNTS[1:], -COUNTS, COUNTS[None]])
def test_counts_that_do_not_fit_are_refused(counts):
    with pytest.raises(ValueError, match="give one for each of 12 words"):
        start_from_frequencies(trellis(), counts)
