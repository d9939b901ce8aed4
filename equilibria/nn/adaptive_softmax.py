"""A softmax over a large vocabulary whose rare words cost little."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from equilibria.nn.adaptive_embedding import AdaptiveEmbedding
from equilibria.nn.affine import affine
from equilibria.nn.clusters import Clusters, check_ids, normal_parameters
from equilibria.nn.word_loss import word_loss


class AdaptiveSoftmax(nn.Module):
    """-log p(w | h), where p chooses a word of cluster 0 or one of the other clusters, and then a word of that cluster.

        p(w) = p_0(w)                          w in cluster 0,
        p(w) = p_0(cluster i) p_i(w)           w in cluster i >= 1,
        p_i = softmax(W_i P_iᵀ h + b_i),       p_0 with the rows of `cluster_weight` after those of W_0

    Words are numbered by falling frequency, and `cutoffs` cut them into clusters. Only the positions whose target lies in
    a cluster are multiplied with its weight. Cluster i is narrower than the first by the factor div_val**i. Without
    cutoffs this is the plain softmax at its cost. With div_val 1 and d_embed equal to d_model, nothing is projected: the
    split softmax of the AWD-LSTM and of TrellisNet.

    Parameters: `weights` (size_i, d_i) and `biases` (size_i,) per cluster, or one (n_token, d_embed) and (n_token,) if
    div_val is 1; `projections` (d_model, d_i), one per cluster, or none if div_val is 1 and d_embed equals d_model;
    `cluster_weight` (number of cutoffs, d_embed) and `cluster_bias`, None without cutoffs. Their rows stand in the
    original's order: the LAST belongs to cluster 1, the first to the rarest words.

    Logits of less than float32, as under autocast, are turned into float32 before the softmax.

    Args:
        n_token, d_embed, d_model, cutoffs, div_val: as of `AdaptiveEmbedding`.
        init_std: standard deviation of the normal distribution from which the weights are drawn; biases are zero.
        projection_init_std: the same for the projections.

    Shapes: hidden (..., d_model), targets (...) of integers -> (...), in the order of the targets, in nats.

    Raises:
        ValueError: cutoffs that do not increase or exceed the vocabulary, a div_val that leaves a width of zero, targets
            outside of the vocabulary or of no integer dtype, or shapes that do not fit.

    Sources: Grave et al., "Efficient softmax approximation for GPUs", 2017, section 4; Baevski & Auli, "Adaptive Input
    Representations for Neural Language Modeling", 2019, section 3; Merity, Keskar & Socher, "An Analysis of Neural
    Language Modeling at Multiple Scales", 2018, section 3 (the tied, split softmax); Dai et al., "Transformer-XL", 2019.

    >>> softmax = AdaptiveSoftmax(n_token=100, d_embed=16, d_model=8, cutoffs=(10, 40), div_val=4)
    >>> hidden, targets = torch.randn(2, 5, 8), torch.randint(100, (2, 5))
    >>> nll = softmax(hidden, targets)
    >>> all_words = softmax.log_prob(hidden)
    >>> nll.shape, all_words.shape
    (torch.Size([2, 5]), torch.Size([2, 5, 100]))
    """

    cluster_weight: nn.Parameter | None
    cluster_bias: nn.Parameter | None

    def __init__(
        self, n_token: int, d_embed: int, d_model: int, cutoffs: Sequence[int] = (), div_val: int = 1, *,
        init_std: float = 0.01, projection_init_std: float = 0.01,
    ) -> None:  # fmt: skip
        super().__init__()
        self.clusters = Clusters(n_token=n_token, d_embed=d_embed, d_model=d_model, cutoffs=tuple(cutoffs), div_val=div_val)
        self.weights = self.clusters.tables(init_std)
        self.biases = nn.ParameterList([nn.Parameter(torch.zeros(len(weight))) for weight in self.weights])
        widths = self.clusters.widths if self.clusters.projected else ()
        self.projections = normal_parameters([(d_model, width) for width in widths], projection_init_std)
        tails = len(self.clusters.cutoffs)
        cluster_weight = nn.Parameter(torch.empty(tails, d_embed).normal_(0.0, init_std)) if tails else None
        self.register_parameter("cluster_weight", cluster_weight)
        self.register_parameter("cluster_bias", nn.Parameter(torch.zeros(tails)) if tails else None)

    def forward(self, hidden: Tensor, targets: Tensor) -> Tensor:
        check_shapes(hidden, targets, self.clusters.d_model)
        rows, ids = hidden.reshape(-1, self.clusters.d_model), targets.flatten().long()  # (N, d_model), (N,)
        words = self._words()
        if not self.clusters.cutoffs:
            check_ids(ids, self.clusters.n_token)
            return self._nll(rows, words, 0, ids).view_as(targets)
        order, counts = self.clusters.order(ids)
        _, *members = order.split(counts)
        head_ids, tail_nll = ids.clone(), []
        for i, positions in enumerate(members, start=1):
            head_ids[positions] = self._column(i)
            tail_nll.append(self._nll(rows[positions], words, i, ids[positions] - self.clusters.edges[i]))
        head_nll = self._nll(rows, words, 0, head_ids)
        return head_nll.index_add(0, torch.cat(members), torch.cat(tail_nll)).view_as(targets)

    def log_prob(self, hidden: Tensor) -> Tensor:
        """log p of every word, (..., d_model) -> (..., n_token), at the cost of the full softmax."""
        check_width(hidden, self.clusters.d_model)
        words = self._words()
        head = self._logits(hidden, words, 0).log_softmax(-1)
        parts = [head[..., : self.clusters.sizes[0]]]
        for i in range(1, len(self.clusters.sizes)):
            column = self._column(i)
            parts.append(head[..., column : column + 1] + self._logits(hidden, words, i).log_softmax(-1))
        return torch.cat(parts, -1)

    def tie(
        self,
        embedding: AdaptiveEmbedding | nn.Embedding,
        projections: Sequence[bool] | bool = False,
        *,
        weights: bool = True,
    ) -> None:
        """Let the words have the same vectors as inputs and as outputs: share `embedding`'s tables, as Parameters.

        Copies, moves and `load_state_dict` keep the tie. What makes every parameter anew, such as `to_empty` after the
        construction on the meta device, or `load_state_dict(assign=True)`, does not: tie again afterwards.

        Args:
            embedding: with tables of the same shapes; an `nn.Embedding` if there is but one.
            weights: False leaves the tables apart, to share projections alone.
            projections: whether to share the projection too; a sequence says so for each cluster. With div_val 1 there
                is one projection of inputs, which all clusters chosen share. Of no effect where nothing is projected.

        Raises:
            ValueError: the tables or the projections have other shapes, or the sequence another length.
        """
        if weights:
            tables = [embedding.weight] if isinstance(embedding, nn.Embedding) else list(embedding.tables)
            share_tables(self.weights, tables)
        count = len(self.clusters.sizes)
        wanted = [projections] * count if isinstance(projections, bool) else list(projections)
        if len(wanted) != count:
            raise ValueError(f"projections={projections!r} has {len(wanted)} entries; give one per cluster: {count}")
        if not any(wanted) or not len(self.projections):
            return
        inputs = [] if isinstance(embedding, nn.Embedding) else list(embedding.projections)
        shared = inputs * count if len(inputs) == 1 else inputs
        for i, (chosen, own) in enumerate(zip(wanted, self.projections, strict=True)):
            if not chosen:
                continue
            if i >= len(shared) or shared[i].shape != own.shape:
                found = [tuple(projection.shape) for projection in inputs]
                raise ValueError(
                    f"projection {i} of the softmax has shape {tuple(own.shape)}, those of the embedding {found}; "
                    "give both the same d_embed, d_model, cutoffs and div_val, or do not tie their projections"
                )
            self.projections[i] = shared[i]

    def cluster_order(self, targets: Tensor) -> Tensor:
        """The permutation (N,) of the flattened targets that sorts them by cluster, and keeps their order within each.

        The code of 2019 returns its losses so: they are `softmax(hidden, targets).flatten()[order]`.
        """
        return self.clusters.order(targets.long())[0]

    def _column(self, i: int) -> int:
        """The column of the head that stands for cluster i >= 1: the i-th from the end."""
        return self.clusters.sizes[0] + len(self.clusters.cutoffs) - i

    def _words(self) -> list[tuple[Tensor, Tensor]]:
        """Per cluster the vectors (size_i, d_i) and biases (size_i,); those of the head with the rows of the tails."""
        weights, biases = list(self.weights), list(self.biases)
        sizes = list(self.clusters.sizes)
        if len(weights) < len(sizes):  # one split, since the gradient of each slice alone would be as large as the table
            weights, biases = list(weights[0].split(sizes)), list(biases[0].split(sizes))
        if self.cluster_weight is not None and self.cluster_bias is not None:
            weights[0], biases[0] = torch.cat([weights[0], self.cluster_weight]), torch.cat([biases[0], self.cluster_bias])
        return list(zip(weights, biases, strict=True))

    def _nll(self, hidden: Tensor, words: Sequence[tuple[Tensor, Tensor]], i: int, ids: Tensor) -> Tensor:
        """(N, d_model), (N,) -> (N,), for words of cluster i by their place in it, or columns of the head."""
        return word_loss(self._vectors(hidden, i), *words[i], ids)

    def _logits(self, hidden: Tensor, words: Sequence[tuple[Tensor, Tensor]], i: int) -> Tensor:
        """(..., d_model) -> (..., size_i), for the head with a column for each tail; in float32 at least."""
        return at_least_float32(affine(self._vectors(hidden, i), *words[i]))

    def _vectors(self, hidden: Tensor, i: int) -> Tensor:
        """(..., d_model) -> (..., d_i)"""
        return affine(hidden, self.projections[i].t()) if len(self.projections) else hidden

    def extra_repr(self) -> str:
        c = self.clusters
        return f"{c.n_token}, {c.d_embed}, {c.d_model}, cutoffs={c.cutoffs}, div_val={c.div_val}"


def at_least_float32(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def share_tables(own: nn.ParameterList, tables: Sequence[Tensor]) -> None:
    """Put the tables of an embedding, the Parameters themselves, in the place of a softmax's own."""
    shapes, found = ([tuple(tensor.shape) for tensor in tensors] for tensors in (own, tables))
    if shapes != found:
        raise ValueError(
            f"the embedding has tables of shapes {found}, the softmax weights of shapes {shapes}; "
            "give both the same sizes, cutoffs and div_val"
        )
    for i, table in enumerate(tables):
        own[i] = table


def check_shapes(hidden: Tensor, targets: Tensor, width: int) -> None:
    check_width(hidden, width)
    if hidden.shape[:-1] != targets.shape:
        raise ValueError(
            f"hidden has shape {tuple(hidden.shape)} and targets {tuple(targets.shape)}; "
            f"give one target for each position: {tuple(hidden.shape[:-1])}"
        )
    if targets.dtype == torch.bool or targets.is_floating_point() or targets.is_complex():
        raise ValueError(f"targets have dtype {targets.dtype}; give the ids of words, as integers of any size")


def check_width(hidden: Tensor, width: int) -> None:
    if hidden.dim() < 1 or hidden.shape[-1] != width:
        raise ValueError(
            f"hidden has shape {tuple(hidden.shape)}; its last size must be d_model = {width}, as (..., {width})"
        )
