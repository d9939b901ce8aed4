"""Word vectors that are narrower for rarer words."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from equilibria.nn.affine import affine
from equilibria.nn.clusters import Clusters, check_ids, normal_parameters


class AdaptiveEmbedding(nn.Module):
    """√d_model P_i E_i[w - edge_i]: the vector of word w of cluster i, projected to the width of the model.

    Words are numbered by falling frequency, and `cutoffs` cut them into clusters. Cluster i has a table E_i of width
    d_embed // div_val**i and a projection P_i. With div_val 1 all words share one table and one projection, and if also
    d_embed equals d_model there is none: an ordinary embedding, scaled.

    Parameters: `tables`, of shapes (size_i, d_i), or one (n_token, d_embed); `projections`, of shapes (d_model, d_i).

    Args:
        n_token: number of words.
        d_embed: width of the vectors of the most frequent words.
        d_model: width of the output.
        cutoffs: the first word of every cluster but the first, increasing, between 0 and n_token, both excluded.
        div_val: factor by which each cluster is narrower than the one before it.
        init_std: standard deviation of the normal distribution from which the tables are drawn.
        projection_init_std: the same for the projections.

    Shapes: ids (...) of integers -> (..., d_model).

    Raises:
        ValueError: cutoffs that do not increase or exceed the vocabulary, a div_val that leaves a width of zero, or an id
            outside of the vocabulary.

    Sources: Baevski & Auli, "Adaptive Input Representations for Neural Language Modeling", 2019, section 3; Dai et al.,
    "Transformer-XL", 2019 (the scale, and the projection of the first cluster); Bai, Kolter & Koltun, "Deep Equilibrium
    Models", 2019, appendix, for its use here.

    >>> embedding = AdaptiveEmbedding(n_token=100, d_embed=16, d_model=8, cutoffs=(10, 40), div_val=4)
    >>> embedding(torch.tensor([[3, 70, 12]])).shape, [tuple(table.shape) for table in embedding.tables]
    (torch.Size([1, 3, 8]), [(10, 16), (30, 4), (60, 1)])
    """

    def __init__(
        self, n_token: int, d_embed: int, d_model: int, cutoffs: Sequence[int] = (), div_val: int = 1, *,
        init_std: float = 0.01, projection_init_std: float = 0.01,
    ) -> None:  # fmt: skip
        super().__init__()
        self.clusters = Clusters(n_token=n_token, d_embed=d_embed, d_model=d_model, cutoffs=tuple(cutoffs), div_val=div_val)
        self.tables = self.clusters.tables(init_std)
        widths = self.clusters.widths[: len(self.tables)] if self.clusters.projected else ()
        self.projections = normal_parameters([(d_model, width) for width in widths], projection_init_std)

    def forward(self, ids: Tensor) -> Tensor:
        vectors = self._one_table(ids) if len(self.tables) == 1 else self._many_tables(ids)
        return vectors * self.clusters.d_model**0.5

    def _one_table(self, ids: Tensor) -> Tensor:
        check_ids(ids, self.clusters.n_token)
        vectors = F.embedding(ids, self.tables[0])
        return affine(vectors, self.projections[0]) if len(self.projections) else vectors

    def _many_tables(self, ids: Tensor) -> Tensor:
        order, counts = self.clusters.order(ids)
        members = ids.flatten()[order].split(counts)
        parts = zip(members, self.clusters.edges[:-1], self.tables, self.projections, strict=True)
        sorted_vectors = torch.cat([affine(F.embedding(m - first, table), p) for m, first, table, p in parts])
        vectors = torch.empty_like(sorted_vectors).index_copy(0, order, sorted_vectors)  # (N, d_model), in token order
        return vectors.view(*ids.shape, self.clusters.d_model)

    def extra_repr(self) -> str:
        c = self.clusters
        return f"{c.n_token}, {c.d_embed}, {c.d_model}, cutoffs={c.cutoffs}, div_val={c.div_val}"
