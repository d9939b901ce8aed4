"""An output layer of more expressive power than one softmax."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from equilibria.nn.adaptive_embedding import AdaptiveEmbedding
from equilibria.nn.adaptive_softmax import at_least_float32, check_shapes, check_width, share_tables
from equilibria.nn.clusters import check_ids
from equilibria.nn.dropout import FrozenDropout
from equilibria.solvers.solver import check_count


class MixtureOfSoftmaxes(nn.Module):
    """-log(p(w | h) + eps), where p is the mean of K softmaxes with weights that depend on h.

        p(w) = Σ_k π_k softmax(W tanh(l_k) + b)_w,    π = softmax(prior(h)),    (l_1, ..., l_K) = latent(h)

    The logarithm of p is computed from logarithms, so that no probability underflows. With the default eps the result is
    log(p + 1e-8), as in the original: no word has less than -18.4, and probabilities add up to 1 + n_token * 1e-8. With
    eps 0 it is log p.

    Parameters: `weight` (n_token, d_embed) and `bias` (n_token,) of the softmaxes, `prior` and `latent`, linear maps of
    the hidden vector. In training mode entries of `latent(h)` are dropped before the tanh, the same at all positions of
    a sequence: for hidden vectors (B, L, d_model) the mask has shape (B, 1, K * d_embed). Vectors (N, d_model) are the
    positions of one sequence, and (d_model,) is one position.

    Args:
        n_token: number of words.
        d_model: width of the hidden vector h.
        d_embed: width of the vectors of words.
        n_experts: number K of softmaxes.
        dropout: probability that an entry of the latent vectors is zeroed, 0 <= p < 1.
        eps: added to the probabilities, at least 0.
        init_std: standard deviation of the normal distribution from which all weights are drawn; biases are zero. None
            leaves `prior` and `latent` as nn.Linear draws them, and takes 0.01 for the words.

    Shapes: hidden (..., d_model), targets (...) of integers -> (...), in nats.

    Raises:
        ValueError: a size below 1, a dropout outside [0, 1), a negative eps, targets outside of the vocabulary or of no
            integer dtype, or shapes that do not fit.

    Source: Yang et al., "Breaking the Softmax Bottleneck: A High-Rank RNN Language Model", 2018, section 2.4.

    >>> mixture = MixtureOfSoftmaxes(n_token=50, d_model=8, d_embed=6, n_experts=3)
    >>> hidden, targets = torch.randn(2, 5, 8), torch.randint(50, (2, 5))
    >>> nll, all_words = mixture(hidden, targets), mixture.log_prob(hidden)
    >>> nll.shape, all_words.shape
    (torch.Size([2, 5]), torch.Size([2, 5, 50]))
    """

    def __init__(
        self, n_token: int, d_model: int, d_embed: int, n_experts: int, dropout: float = 0.0, *,
        eps: float = 1e-8, init_std: float | None = 0.01,
    ) -> None:  # fmt: skip
        super().__init__()
        sizes = {"n_token": n_token, "d_model": d_model, "d_embed": d_embed, "n_experts": n_experts}
        for option, size in sizes.items():
            check_count("MixtureOfSoftmaxes", option, size, 1)
        if not eps >= 0.0:
            raise ValueError(f"eps is {eps}; what is added to the probabilities must be at least 0")
        self.n_token, self.d_model, self.d_embed, self.n_experts, self.eps = n_token, d_model, d_embed, n_experts, eps
        self.weight = nn.Parameter(torch.empty(n_token, d_embed).normal_(0.0, 0.01 if init_std is None else init_std))
        self.bias = nn.Parameter(torch.zeros(n_token))
        self.prior = nn.Linear(d_model, n_experts)
        self.latent = nn.Linear(d_model, n_experts * d_embed)
        if init_std is not None:
            for linear in (self.prior, self.latent):
                nn.init.normal_(linear.weight, 0.0, init_std)
                nn.init.zeros_(linear.bias)
        self.drop = FrozenDropout(dropout, shared_dims=(-2,))

    def forward(self, hidden: Tensor, targets: Tensor) -> Tensor:
        check_shapes(hidden, targets, self.d_model)
        targets = targets.long()
        check_ids(targets, self.n_token)
        log_prior, logits = self._experts(hidden)  # (..., K), (..., K, V)
        ids = targets.unsqueeze(-1).expand_as(log_prior)
        nll = F.cross_entropy(logits.reshape(-1, self.n_token), ids.reshape(-1), reduction="none").view_as(log_prior)
        return -self._add_eps((log_prior - nll).logsumexp(-1))

    def log_prob(self, hidden: Tensor) -> Tensor:
        """log(p + eps) of every word, (..., d_model) -> (..., n_token)."""
        log_prior, logits = self._experts(hidden)
        return self._add_eps((log_prior.unsqueeze(-1) + logits.log_softmax(-1)).logsumexp(-2))

    def tie(self, embedding: AdaptiveEmbedding | nn.Embedding) -> None:
        """Share the table of an embedding, as a Parameter. Raises ValueError if it has another shape."""
        tables = [embedding.weight] if isinstance(embedding, nn.Embedding) else list(embedding.tables)
        shared = nn.ParameterList([self.weight])
        share_tables(shared, tables)
        self.weight = shared[0]

    def _experts(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """log π (..., K) and the logits (..., K, V) of all softmaxes, in float32 at least."""
        check_width(hidden, self.d_model)
        latent = self.latent(hidden)
        mask = self.drop.mask(torch.atleast_2d(latent))
        vectors = torch.tanh(self.drop(latent, mask)).view(*hidden.shape[:-1], self.n_experts, self.d_embed)
        logits, prior = F.linear(vectors, self.weight, self.bias), self.prior(hidden)
        return at_least_float32(prior).log_softmax(-1), at_least_float32(logits)

    def _add_eps(self, log_p: Tensor) -> Tensor:
        return torch.logaddexp(log_p, torch.full_like(log_p, math.log(self.eps))) if self.eps else log_p

    def extra_repr(self) -> str:
        return f"n_token={self.n_token}, d_embed={self.d_embed}, n_experts={self.n_experts}, eps={self.eps}"
