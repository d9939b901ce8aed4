"""The block of the DEQ-Transformer: a Transformer-XL layer with the input injected, split for an equilibrium solve."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from equilibria.nn import parametrizations
from equilibria.nn.affine import affine, affine_relu
from equilibria.nn.dropout import FrozenDropout
from equilibria.nn.relative_attention import (
    relative_attention,
    relative_mask,
    sinusoidal_frequencies,
    sinusoidal_positions,
)


class Memory(NamedTuple):
    """Positions before a segment, as M columns."""

    z: Tensor
    """(B, M, d) their equilibria."""
    u: Tensor
    """(B, M, 3d) their injections."""


class KeysValues(NamedTuple):
    """What attention needs of positions that are solved: heads first, H heads of width e = d / H."""

    keys: Tensor
    """(H, B, M, e)"""
    values: Tensor
    """(H, B, M, e)"""


class DropoutMasks(NamedTuple):
    """One draw for a whole forward pass, shared over time; None where nothing is dropped."""

    positions: Tensor | None = None
    """(1, d) on the sinusoidal positions"""
    attention: Tensor | None = None
    """(B, 1, d) on the output of attention"""
    hidden: Tensor | None = None
    """(B, 1, d_inner) on the hidden layer of the feed-forward part"""
    output: Tensor | None = None
    """(B, 1, d) on the output of the feed-forward part"""
    weights: Tensor | None = None
    """(B, H, L, K) on the attention weights of L positions that look at K"""


class Weights(NamedTuple):
    """The linear maps as they are applied: normalised where weight norm is on, 1/sqrt(e) in the query rows."""

    qkv: Tensor  # (3d, d)
    attention_out: Tensor  # (d, d)
    attention_out_bias: Tensor  # (d,)
    ff_in: Tensor  # (d_inner, d)
    ff_in_bias: Tensor  # (d_inner,)
    ff_out: Tensor  # (d, d_inner)
    ff_out_bias: Tensor  # (d,)


class Positions(NamedTuple):
    """What relative attention needs of the distances K, ..., 0; the same for all samples."""

    projected: Tensor  # (H, e, K + 1)
    bias: Tensor  # (H, 1, 1, e), turns the content query into the position query
    mask: Tensor | None  # (L, K + 1)


class Prepared(NamedTuple):
    """What `forward` takes besides z."""

    injection: Tensor  # (B, L, 3d), u with the content bias, scaled as the weights are
    past: KeysValues
    weights: Weights
    positions: Positions
    masks: DropoutMasks
    padded_mask: Tensor | None  # (B, L, K + 1)


class TransformerBlock(nn.Module):
    """f(z; u) = LN(n + FF(n)),  n = LN(z + Attention(W_qkv z + u)),  with state z (B, L, d) and injection u (B, L, 3d).

    Attention is that of Transformer-XL (relative positions, biases b_w and b_r, a memory of M earlier columns), FF is
    relu with d_inner hidden units, LN is layer norm without parameters. With `pre_norm`,
    f(z; u) = n + FF(n), n = LN(z + Attention(W_qkv LN(z) + u)): the state itself is not normalised, and the residual of
    the feed-forward part is its normalised input.

    All that stays the same while z moves is computed once, by `prepare`; `forward` uses nothing else.

    Args:
        d_model: d, width of the state; a multiple of n_head, and even.
        n_head: H, number of attention heads, of width d / H.
        d_inner: hidden width of the feed-forward part.
        dropout: probability of dropping a unit, for `draw_masks`.
        attention_dropout: probability of dropping an attention weight, for `draw_weights_mask`.
        pre_norm: normalise before each part instead of after it.
        weight_norm: W = g V / ‖V‖ row by row, for the weights of all five linear maps.
        init_std: the weights start as N(0, init_std²), the biases of linear maps as 0.
        init_normed: False leaves weights under weight norm as nn.Linear draws them.
        stored_frequencies: keep the frequencies of the positions, (d / 2,), in a buffer of that name.

    Source: Bai, Kolter & Koltun, "Deep Equilibrium Models", 2019, section 3.3 and appendix B.

    >>> block = TransformerBlock(d_model=32, n_head=4, d_inner=64)
    >>> u = torch.randn(2, 5, 96)
    >>> block(block.initial(u), *block.prepare(u)).shape
    torch.Size([2, 5, 32])
    """

    batch_dims = (0, 1, None, None, 0, 0)
    """Which dimension of each argument from `prepare` carries the batch."""
    frequencies: Tensor | None

    def __init__(
        self,
        d_model: int,
        n_head: int,
        d_inner: int,
        *,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        pre_norm: bool = False,
        weight_norm: bool = False,
        init_std: float = 0.02,
        init_normed: bool = True,
        stored_frequencies: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (("d_model", d_model), ("n_head", n_head), ("d_inner", d_inner)):
            if value < 1:
                raise ValueError(f"{name} is {value}; give 1 or more")
        if d_model % n_head:
            raise ValueError(f"d_model {d_model} is not a multiple of n_head {n_head}; each head takes an equal share")
        if d_model % 2:
            raise ValueError(f"d_model is {d_model}; sinusoidal positions need an even width")
        self.d_model, self.n_head, self.d_inner, self.pre_norm = d_model, n_head, d_inner, pre_norm
        self.d_head = d_model // n_head
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.position = nn.Linear(d_model, d_model, bias=False)
        self.attention_out = nn.Linear(d_model, d_model)
        self.ff_in = nn.Linear(d_model, d_inner)
        self.ff_out = nn.Linear(d_inner, d_model)
        self.content_bias = nn.Parameter(torch.empty(n_head, self.d_head))  # b_w
        self.position_bias = nn.Parameter(torch.empty(n_head, self.d_head))  # b_r
        self.time_dropout = FrozenDropout(dropout, shared_dims=(1,))  # (B, 1, width)
        self.position_dropout = FrozenDropout(dropout, shared_dims=(0,))  # (1, d)
        self.weights_dropout = FrozenDropout(attention_dropout)  # (B, H, L, K)
        self.register_buffer("frequencies", sinusoidal_frequencies(d_model) if stored_frequencies else None)
        self._initialise(init_std, weights=init_normed or not weight_norm)
        if weight_norm:  # after the initialisation, which would otherwise write to a derived tensor and be lost
            for linear in self._linears():
                parametrizations.weight_norm(linear)

    def _linears(self) -> tuple[nn.Linear, ...]:
        return (self.qkv, self.position, self.attention_out, self.ff_in, self.ff_out)

    def _initialise(self, std: float, *, weights: bool) -> None:
        for linear in self._linears() if weights else ():
            nn.init.normal_(linear.weight, std=std)
        for linear in (self.attention_out, self.ff_in, self.ff_out):
            nn.init.zeros_(linear.bias)
        nn.init.normal_(self.content_bias, std=std)
        nn.init.normal_(self.position_bias, std=std)

    # Before a solve

    def draw_masks(self, like: Tensor) -> DropoutMasks:
        """The masks of one forward pass over (B, L, d) inputs of the dtype and device of `like` (B, ...)."""
        batch = like.shape[0]
        state = like.new_empty(()).expand(batch, 1, self.d_model)
        hidden = like.new_empty(()).expand(batch, 1, self.d_inner)
        return DropoutMasks(
            positions=self.position_dropout.mask(state[0]),
            attention=self.time_dropout.mask(state),
            hidden=self.time_dropout.mask(hidden),
            output=self.time_dropout.mask(state),
        )

    def draw_weights_mask(self, like: Tensor, columns: int) -> Tensor | None:
        """(B, H, L, K) the mask on attention weights for one solve of like (B, L, ...) positions that look at K columns."""
        return self.weights_dropout.mask(like, (like.shape[0], self.n_head, like.shape[1], columns))

    def initial(self, injection: Tensor, *_: Any) -> Tensor:
        """z_0 = 0, (B, L, d)."""
        batch, length, _channels = injection.shape
        return injection.new_zeros(batch, length, self.d_model)

    def prepare(
        self,
        injection: Tensor,
        past: Memory | KeysValues | None = None,
        masks: DropoutMasks | None = None,
        window: int | None = None,
        padding: Tensor | None = None,
        distances: Tensor | None = None,
    ) -> Prepared:
        """The arguments of `forward`: all that stays the same while z moves.

        Args:
            injection: (B, L, 3d), u.
            past: the M positions before the first, as states and injections or as keys and values; None for M = 0.
            masks: of `draw_masks`; None to drop nothing.
            window: how many positions one position sees, itself included; None for all.
            padding: (B,) how many of the first of the M + L positions are no text, and are seen by none; None for none.
            distances: of `project_distances`, M + L + 1 of them or more; None to compute them, with the mask on positions.
        """
        masks = masks or DropoutMasks()
        weights = self._weights()
        if past is None:
            empty = injection.new_empty(self.n_head, injection.shape[0], 0, self.d_head)
            past = KeysValues(empty, empty)
        elif isinstance(past, Memory):
            past = self._keys_values(past.z, past.u, weights)
        memory = past.keys.shape[2]
        length = injection.shape[1]
        if distances is None:
            distances = self.project_distances(injection, memory + length + 1, masks.positions)
        bias = (self.position_bias - self.content_bias) / math.sqrt(self.d_head)
        mask = relative_mask(length, memory, window, like=injection)
        positions = Positions(distances[..., -(memory + length + 1) :], bias[:, None, None], mask)
        padded_mask = None
        if padding is not None:
            padded_mask = relative_mask(length, memory, window, padding, like=injection)
        content_bias = F.pad(self.content_bias.flatten(), (0, 2 * self.d_model))  # (3d,), 0 for keys and values
        injected = (injection + content_bias) * self._query_scale(injection)
        return Prepared(injected, past, weights, positions, masks._replace(positions=None), padded_mask)

    def keys_values(self, z: Tensor, injection: Tensor, weights: Weights | None = None) -> KeysValues:
        """Keys and values of solved positions z (B, M, d) with injection (B, M, 3d): a `past` for the next solve.

        `weights` are those that `prepare` returned, if it was called.
        """
        return self._keys_values(z, injection, self._weights() if weights is None else weights)

    def project_distances(self, like: Tensor, count: int, mask: Tensor | None = None) -> Tensor:
        """(H, e, count): the distances count - 1, ..., 0 as attention compares them with queries.

        Those of fewer distances are the last columns. `mask` (1, d) is that of dropout on positions.
        """
        exact = torch.promote_types(like.dtype, torch.float32)
        distances = torch.arange(count - 1, -1, -1, dtype=exact, device=like.device)
        sinusoids = sinusoidal_positions(distances, self.d_model, self.frequencies)
        sinusoids = self.position_dropout(sinusoids.to(like.dtype), mask)
        return affine(sinusoids, self.position.weight).view(-1, self.n_head, self.d_head).permute(1, 2, 0).contiguous()

    def _keys_values(self, z: Tensor, injection: Tensor, weights: Weights) -> KeysValues:
        d = self.d_model
        projected = affine(self._norm(z) if self.pre_norm else z, weights.qkv[d:], injection[..., d:])
        keys, values = self._heads(projected, 2)
        return KeysValues(keys.contiguous(), values.contiguous())

    def _weights(self) -> Weights:
        # Reading `.weight` normalises it under weight norm, so each is read once.
        out, ff_in, ff_out = self.attention_out, self.ff_in, self.ff_out
        qkv = self.qkv.weight
        qkv = qkv * self._query_scale(qkv)[:, None]
        return Weights(qkv, out.weight, out.bias, ff_in.weight, ff_in.bias, ff_out.weight, ff_out.bias)

    def _query_scale(self, like: Tensor) -> Tensor:
        """(3d,): 1/sqrt(e), the scale of the scores, for the query channels and 1 for keys and values."""
        scale = like.new_ones(3 * self.d_model)
        scale[: self.d_model] = 1.0 / math.sqrt(self.d_head)
        return scale

    def _heads(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        """(B, L, parts d) -> parts views of (H, B, L, e)."""
        return x.unflatten(-1, (parts, self.n_head, self.d_head)).permute(2, 3, 0, 1, 4).unbind(0)

    def _norm(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (self.d_model,), eps=1e-5)

    # During a solve

    def forward(
        self,
        z: Tensor,
        injection: Tensor,
        past: KeysValues,
        weights: Weights,
        positions: Positions,
        masks: DropoutMasks,
        padded_mask: Tensor | None = None,
    ) -> Tensor:
        """f(z), (B, L, d); the arguments are those that `prepare` returns."""
        drop = self.time_dropout
        if padded_mask is not None:  # (B, L, K + 1), with what no sample sees
            positions = positions._replace(mask=padded_mask)
        normed = self._norm(z) if self.pre_norm else z
        attended = self._attend(normed, injection, past, weights, positions, masks.weights)
        state = self._norm(z + drop(attended, masks.attention))
        hidden = drop(affine_relu(state, weights.ff_in, weights.ff_in_bias), masks.hidden)
        output = state + drop(affine(hidden, weights.ff_out, weights.ff_out_bias), masks.output)
        return output if self.pre_norm else self._norm(output)

    def _attend(
        self,
        z: Tensor,
        injection: Tensor,
        past: KeysValues,
        weights: Weights,
        positions: Positions,
        mask: Tensor | None,
    ) -> Tensor:
        batch, length, _ = z.shape
        qkv = affine(z, weights.qkv, injection)  # (B, L, 3d)
        queries, keys, values = self._heads(qkv, 3)  # (H, B, L, e)
        content_query = queries.contiguous()
        attended = relative_attention(
            content_query,
            content_query + positions.bias,
            torch.cat((past.keys, keys), dim=2),  # (H, B, K, e)
            torch.cat((past.values, values), dim=2),
            positions.projected,
            positions.mask,
            mask,
        )
        joined = attended.permute(1, 2, 0, 3).reshape(batch, length, self.d_model)
        return affine(joined, weights.attention_out, weights.attention_out_bias)
