"""A vocabulary, sorted by falling frequency, cut into clusters of rarer and rarer words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from equilibria.solvers.solver import check_count


@dataclass(frozen=True, kw_only=True)
class Clusters:
    """Where a vocabulary is cut, and how wide the vectors of each piece are, for the adaptive embedding and softmax.

    Cluster i holds the words from `edges[i]` up to `edges[i + 1]`; its vectors have width d_embed // div_val**i.

    Raises:
        ValueError: the cutoffs do not increase from 1 to n_token - 1, or a width is zero.
    """

    n_token: int
    d_embed: int
    d_model: int
    cutoffs: tuple[int, ...] = ()
    div_val: int = 1

    def __post_init__(self) -> None:
        for option in ("n_token", "d_embed", "d_model", "div_val"):
            check_count("Clusters", option, getattr(self, option), 1)
        if any(left >= right for left, right in pairwise(self.edges)):
            raise ValueError(
                f"cutoffs are {self.cutoffs}; give integers that increase and lie between 0 and n_token = {self.n_token}, "
                "both excluded, or () for one cluster"
            )
        if 0 in self.widths:
            raise ValueError(
                f"div_val {self.div_val} leaves width 0 to a cluster (widths {self.widths}); lower div_val, "
                f"cut the vocabulary less often, or raise d_embed = {self.d_embed}"
            )

    @property
    def edges(self) -> tuple[int, ...]:
        return (0, *self.cutoffs, self.n_token)

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(right - left for left, right in pairwise(self.edges))

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(self.d_embed // self.div_val**i for i in range(len(self.cutoffs) + 1))

    @property
    def projected(self) -> bool:
        """Vectors are projected from or to the width of the model, always if clusters differ in width."""
        return self.div_val > 1 or self.d_embed != self.d_model

    def tables(self, init_std: float) -> nn.ParameterList:
        """(n_token, d_embed), or one table (size, width) per cluster, drawn from N(0, init_std²)."""
        if self.div_val == 1:  # all have one width
            return normal_parameters([(self.n_token, self.d_embed)], init_std)
        return normal_parameters(list(zip(self.sizes, self.widths, strict=True)), init_std)

    def order(self, ids: Tensor) -> tuple[Tensor, list[int]]:
        """The permutation (N,) that sorts `ids` by cluster and keeps their order within one, and the number in each."""
        ids = ids.flatten()
        cluster = torch.bucketize(ids, ids.new_tensor(self.edges), right=True)  # 0 and the last are out of range
        below, *counts, above = torch.bincount(cluster, minlength=len(self.edges) + 1).tolist()
        if below or above:
            raise _out_of_range(ids, self.n_token)
        return cluster.argsort(stable=True), counts


def normal_parameters(shapes: Sequence[tuple[int, int]], std: float) -> nn.ParameterList:
    return nn.ParameterList([nn.Parameter(torch.empty(shape).normal_(0.0, std)) for shape in shapes])


def check_ids(ids: Tensor, n_token: int) -> None:
    """Refuse ids outside of the vocabulary with an error that can be read on every device."""
    if torch.compiler.is_compiling() or ids.is_meta or not ids.numel():
        return
    if bool(((ids < 0) | (ids >= n_token)).any()):
        raise _out_of_range(ids, n_token)


def _out_of_range(ids: Tensor, n_token: int) -> ValueError:
    low, high = (int(bound) for bound in ids.aminmax())
    return ValueError(
        f"token ids range from {low} to {high}, but the vocabulary has {n_token} words, 0 to {n_token - 1}; "
        "use the vocabulary that the model was made for, or a model of that size"
    )
