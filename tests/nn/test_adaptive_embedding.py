"""Adaptive embedding: the original's recorded vectors and gradients, the definition word by word, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from recorded import load, read, same, same_gradients, starting_with
from torch import Tensor

from equilibria.nn import AdaptiveEmbedding

F64 = torch.float64
NAMES = {r"emb_layers\.(\d+)\.weight": r"tables.\1", r"emb_projs\.(\d+)": r"projections.\1"}


def word_by_word(embedding: AdaptiveEmbedding, ids: Tensor) -> Tensor:
    """The vectors as they are defined."""
    c, vectors = embedding.clusters, []
    for w in ids.flatten().tolist():
        i = sum(w >= cutoff for cutoff in c.cutoffs) if c.div_val > 1 else 0
        vector = embedding.tables[i][w - (c.edges[i] if c.div_val > 1 else 0)]
        projected = embedding.projections[i] @ vector if len(embedding.projections) else vector
        vectors.append(projected * c.d_model**0.5)
    return torch.stack(vectors).view(*ids.shape, c.d_model)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_recorded(shared_golden, dtype):
    config, groups = read(shared_golden / "component_adaptive_embedding", dtype)
    for name, options in config["variants"].items():
        recorded, params = groups[name], starting_with("param.", groups[name])
        embedding = AdaptiveEmbedding(
            options["n_token"], options["d_embed"], options["d_proj"], options["cutoffs"], options["div_val"]
        )
        load(embedding, NAMES, params)
        out = embedding(recorded["ids"])
        same(out, recorded["out"])
        out.backward(recorded["upstream"])
        same_gradients(embedding, NAMES, starting_with("grad.", recorded))


@st.composite
def embeddings(draw: st.DrawFn) -> AdaptiveEmbedding:
    n_token = draw(st.integers(2, 30))
    cutoffs = sorted(draw(st.sets(st.integers(1, n_token - 1), max_size=3)))
    div_val = draw(st.integers(1, 3))
    d_embed = draw(st.integers(div_val ** len(cutoffs), div_val ** len(cutoffs) + 5))
    return AdaptiveEmbedding(n_token, d_embed, draw(st.integers(1, 6)), cutoffs, div_val, init_std=1.0).to(F64)


@given(embeddings(), st.integers(0, 2**31), st.sampled_from([(), (0,), (1,), (3, 4), (2, 0)]))
def test_is_what_is_defined(embedding, seed, shape):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(embedding.clusters.n_token, shape, generator=generator)
    found = embedding(ids)
    assert found.shape == (*shape, embedding.clusters.d_model)
    if ids.numel():
        torch.testing.assert_close(found, word_by_word(embedding, ids), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("div_val", [1, 2])
def test_gradients(div_val):
    embedding = AdaptiveEmbedding(12, 4, 3, (3, 7), div_val, init_std=0.5, projection_init_std=0.5).to(F64)
    ids = torch.tensor([[11, 0, 3, 6], [7, 0, 2, 5]])
    names = [name for name, _ in embedding.named_parameters()]

    def f(*values: Tensor) -> Tensor:
        return torch.func.functional_call(embedding, dict(zip(names, values, strict=True)), (ids,))

    assert torch.autograd.gradcheck(f, tuple(embedding.parameters()))


def test_a_cluster_without_words_has_gradient_zero():
    embedding = AdaptiveEmbedding(12, 4, 3, (3, 7), 2)
    embedding(torch.tensor([1, 2])).sum().backward()
    assert all(parameter.grad is not None for parameter in embedding.parameters())
    assert not torch.as_tensor(embedding.tables[1].grad).any()


@pytest.mark.parametrize("div_val", [1, 4])
def test_is_drawn_with_the_standard_deviations_given(div_val):
    torch.manual_seed(0)
    embedding = AdaptiveEmbedding(4000, 64, 100, (500, 1000), div_val, init_std=0.3, projection_init_std=0.02)
    for std, parameters in ((0.3, embedding.tables), (0.02, embedding.projections)):
        values = torch.cat([p.detach().flatten() for p in parameters])
        assert values.std().item() == pytest.approx(std, rel=5 / (2 * len(values)) ** 0.5)
        assert abs(values.mean().item()) < 5 * std / len(values) ** 0.5


@pytest.mark.parametrize("div_val", [1, 4])
def test_number_of_parameters_without_memory(div_val):
    with torch.device("meta"):
        embedding = AdaptiveEmbedding(267735, 512, 512, (20000, 40000, 200000), div_val)
    assert all(parameter.is_meta for parameter in embedding.parameters())
    by_hand = 267735 * 512
    if div_val == 4:
        sizes, widths = [20000, 20000, 160000, 67735], [512, 128, 32, 8]
        by_hand = sum((size + 512) * width for size, width in zip(sizes, widths, strict=True))
    assert sum(parameter.numel() for parameter in embedding.parameters()) == by_hand


def test_copies_are_equal_and_independent():
    embedding = AdaptiveEmbedding(12, 4, 3, (3, 7), 2)
    other, ids = copy.deepcopy(embedding), torch.arange(12)
    assert torch.equal(other(ids), embedding(ids))
    with torch.no_grad():
        embedding.tables[2].add_(1.0)
    assert not torch.equal(other(ids), embedding(ids))
    other.load_state_dict(embedding.state_dict())
    assert torch.equal(other(ids), embedding(ids))


def test_autocast_runs_and_stays_near():
    embedding = AdaptiveEmbedding(12, 8, 16, (3, 7), 2, init_std=1.0, projection_init_std=1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = embedding(torch.arange(12))
    torch.testing.assert_close(low.float(), embedding(torch.arange(12)), rtol=0.05, atol=0.5)


@pytest.mark.parametrize("cutoffs", [(7, 7), (9, 3), (0, 5), (5, 20), (-2,), (25,)])
def test_refuses_impossible_cutoffs(cutoffs):
    with pytest.raises(ValueError, match="give integers that increase and lie between 0 and n_token = 20"):
        AdaptiveEmbedding(20, 8, 8, cutoffs)


def test_refuses_clusters_of_width_zero():
    with pytest.raises(ValueError, match=r"leaves width 0 to a cluster \(widths \(8, 2, 0\)\)"):
        AdaptiveEmbedding(20, 8, 8, (5, 10), 4)


@pytest.mark.parametrize("div_val", [1, 2])
@pytest.mark.parametrize("word", [-1, 20])
def test_refuses_words_outside_of_the_vocabulary(div_val, word):
    with pytest.raises(ValueError, match="but the vocabulary has 20 words, 0 to 19"):
        AdaptiveEmbedding(20, 8, 8, (5, 10), div_val)(torch.tensor([3, word]))


@pytest.mark.parametrize("option", ["n_token", "d_embed", "d_model", "div_val"])
def test_refuses_sizes_below_one(option):
    sizes: dict[str, Any] = {"n_token": 20, "d_embed": 8, "d_model": 8, "div_val": 1, option: 0}
    with pytest.raises(ValueError, match=f"{option} must be an integer >= 1"):
        AdaptiveEmbedding(**sizes)
