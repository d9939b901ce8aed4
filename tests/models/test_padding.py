"""Texts of several lengths that end together: padding before a text changes nothing in it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from equilibria import Stopping
from equilibria.models import DEQTransformerLM, DEQTrellisNetLM, EquilibriumLM, TransformerConfig, TrellisConfig

V, LENGTH = 11, 9
LENGTHS = (9, 4, 1)


def make(family: str, **options: Any) -> EquilibriumLM:
    torch.manual_seed(0)
    stopping = Stopping(rtol=1e-12, atol=0.0, max_evals=300)
    if family == "transformer":
        config = TransformerConfig(vocab_size=V, d_model=16, n_head=2, d_inner=12, **{"mem_len": 0, **options})
        model: EquilibriumLM = DEQTransformerLM(config, stopping=stopping)
    else:
        model = DEQTrellisNetLM(
            TrellisConfig(vocab_size=V, d_embed=6, d_hidden=5, d_output=6, **options), stopping=stopping
        )
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


CASES = [
    ("transformer", {}),
    ("transformer", {"mem_len": 3}),
    ("transformer", {"depth": 3, "mem_len": 4}),
    ("trellisnet", {}),
    ("trellisnet", {"kernel_size": 3, "dilation": 2, "weight_norm": True}),
    ("trellisnet", {"kernel_size": 3, "depth": 3}),
]


@pytest.mark.parametrize(("family", "options"), CASES)
@pytest.mark.parametrize("sizes", [(9,), (2, 4, 3), (6, 1, 1, 1), (1,) * 9])
@torch.no_grad()
def test_padding_before_a_text_changes_nothing_in_it(family: str, options: dict[str, Any], sizes: tuple[int, ...]) -> None:
    model = make(family, **options)
    text = torch.randint(V, (len(LENGTHS), LENGTH), generator=torch.Generator().manual_seed(1))
    left = torch.tensor([LENGTH - length for length in LENGTHS])
    states, cache = [], None
    for piece in text.split(list(sizes), dim=1):
        padding = left.clamp_max(piece.shape[1])
        left = left - padding
        z, cache, stats = model.extend(piece, cache, model.window, padding if int(padding.sum()) else None)
        assert (stats is None) == (model.config.depth is not None)
        states.append(z)
    together = torch.cat(states, 1)
    for row, length in enumerate(LENGTHS):
        alone = model.extend(text[row : row + 1, LENGTH - length :], None, model.window).z
        torch.testing.assert_close(together[row : row + 1, LENGTH - length :], alone, rtol=1e-8, atol=1e-8)
    assert together.std() > 1e-2


@pytest.mark.parametrize(("family", "options"), CASES)
@torch.no_grad()
def test_rows_of_a_cache_go_on_as_the_samples_they_belong_to(family: str, options: dict[str, Any]) -> None:
    model = make(family, **options)
    text, following = (torch.randint(V, (3, n), generator=torch.Generator().manual_seed(n)) for n in (5, 1))
    cache = model.extend(text, None, model.window, torch.tensor([2, 0, 4])).cache
    order = torch.tensor([2, 0, 0, 1])
    expected = model.extend(following, cache, model.window).z[order]
    found = model.extend(following[order], cache.rows(order), model.window).z
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
