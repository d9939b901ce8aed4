"""Both models of the original in plain tensor code, written from its description and slow: what ours are compared to.

As there, channels stand before time, and parameters have the original's names. Equilibria are had by iteration alone, and
gradients by autograd through it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ITERATIONS = 1000


@dataclass
class Plain:
    """Parameters, masks and data that a test draws, and the keys of a state dict in which tied ones are repeated."""

    options: dict[str, Any]
    splits: list[int] = field(default_factory=list)
    parameters: dict[str, Tensor] = field(default_factory=dict)
    repeated: dict[str, str] = field(default_factory=dict)
    masks: dict[str, Tensor] = field(default_factory=dict)

    def draw(self, name: str, *shape: int, std: float = 0.3) -> Tensor:
        self.parameters[name] = (std * torch.randn(*shape, dtype=torch.float64)).requires_grad_()
        return self.parameters[name]

    def mask(self, name: str, *shape: int, p: float) -> Tensor:
        self.masks[name] = torch.bernoulli(torch.full(shape, 1 - p, dtype=torch.float64)) / (1 - p)
        return self.masks[name]

    def weight(self, name: str, *shape: int, std: float) -> Tensor:
        """Under weight norm where the options say so, with weights dropped where there is a mask for them."""
        dropped = self.masks.get(f"wdrop.{name.removeprefix('trellisnet.')}", torch.ones(()))
        if not self.options["wnorm"]:
            return self.draw(f"{name}.weight", *shape, std=std) * dropped
        length = self.draw(f"{name}.weight_g", shape[0], *[1] * (len(shape) - 1), std=0.3)
        v = self.draw(f"{name}.weight_v", *shape) * dropped
        return length * v / v.flatten(1).norm(dim=1).view_as(length)

    def state(self) -> dict[str, Tensor]:
        state = {name: tensor.detach() for name, tensor in self.parameters.items()}
        return state | {name: state[first] for name, first in self.repeated.items()}


def clustered_nll(hidden: Tensor, targets: Tensor, heads: list[tuple[Tensor, Tensor, Tensor]], edges: list[int]) -> Tensor:
    """-log p (B, L), from hidden (B, L, d) and for each cluster (projection (d, e), weight, bias).

    Behind the words of the first stands a row for each other cluster, the last for cluster 1.
    """
    nll = torch.zeros_like(hidden[..., 0])
    scores = [F.linear(hidden @ projection, weight, bias).log_softmax(-1) for projection, weight, bias in heads]
    for i, score in enumerate(scores):
        inside = (targets >= edges[i]) & (targets < edges[i + 1])
        word = (targets - edges[i]).clamp(0, edges[i + 1] - edges[i] - 1)
        log_p = score.gather(-1, word[..., None])[..., 0]
        if i:
            log_p = log_p + scores[0][..., -i]
        nll = nll - torch.where(inside, log_p, 0.0)
    return nll


def clusters(
    words: list[Tensor],
    biases: list[Tensor],
    projections: list[Tensor],
    edges: Sequence[int],
    head: tuple[Tensor, Tensor] | None,
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """What `clustered_nll` takes; one table is cut at the edges, `head` (weight, bias) stands for the other clusters."""
    if len(words) == 1:
        cuts = [slice(first, last) for first, last in pairwise(edges)]
        words, biases = [words[0][cut] for cut in cuts], [biases[0][cut] for cut in cuts]
    if head is not None:
        words = [torch.cat((words[0], head[0])), *words[1:]]
        biases = [torch.cat((biases[0], head[1])), *biases[1:]]
    return list(zip(projections, words, biases, strict=True))


def iterated(f: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """The fixed point of f, by plain iteration from z."""
    for _ in range(ITERATIONS):
        last, z = z, f(z)
        if (z - last).norm() < 1e-14 * z.norm():
            return z
    raise AssertionError("the drawn map contracts too little for plain iteration")


def transformer(
    plain: Plain, tokens: Tensor, targets: Tensor, past_z: Tensor, past_u: Tensor, p: float
) -> tuple[Tensor, Tensor]:
    """(nll (B, L), z (B, d, L)) of tokens (B, L) behind a memory z (B, d, M), u (B, 3d, M), with dropout p."""
    o, (batch, length), memory = plain.options, tokens.shape, past_z.shape[2]
    d, columns = o["d_model"], memory + length
    edges, e = [0, *o["cutoffs"], o["n_token"]], o["d_embed"] or d
    sizes = [o["n_token"]] if o["div_val"] == 1 else [b - a for a, b in pairwise(edges)]
    projected = e != d or o["div_val"] != 1
    tables = [plain.draw(f"word_emb.emb_layers.{i}.weight", n, e // o["div_val"] ** i) for i, n in enumerate(sizes)]
    inward = [plain.draw(f"word_emb.emb_projs.{i}", d, t.shape[1], std=0.4) for i, t in enumerate(tables) if projected]

    words = torch.zeros(batch, length, d, dtype=torch.float64)
    for i, table in enumerate(tables):
        first = edges[i] if len(tables) > 1 else 0
        inside = (tokens >= first) & (tokens < first + len(table))
        vectors = table[(tokens - first).clamp(0, len(table) - 1)]
        words = words + torch.where(inside[..., None], vectors @ inward[i].T if projected else vectors, 0.0)
    words = words * math.sqrt(d) * plain.mask("word_emb", batch, 1, d, p=p)
    inject = plain.draw("inject_conv.weight", 3 * d, d, 1, std=0.5)
    u = F.conv1d(words.mT, inject, plain.draw("inject_conv.bias", 3 * d, std=0.1))
    f = _attention_layer(plain, torch.cat((past_u, u), dim=2), past_z, columns, p)
    z = iterated(f, torch.zeros_like(u[:, :d]))

    hidden = (z * plain.mask("output", batch, 1, length, p=p)).mT
    head = None
    if o["cutoffs"]:
        tails = len(o["cutoffs"])
        head = plain.draw("crit.cluster_weight", tails, e), plain.draw("crit.cluster_bias", tails, std=0.1)
    weights, biases = [], []
    for i, table in enumerate(tables):
        name = f"crit.out_layers.{i}.weight"
        weights.append(table if o["tie_weights"] else plain.draw(name, *table.shape))
        plain.repeated |= {name: f"word_emb.emb_layers.{i}.weight"} if o["tie_weights"] else {}
        biases.append(plain.draw(f"crit.out_layers.{i}.bias", len(table), std=0.1))
    outward = [torch.eye(d, dtype=torch.float64)] * (len(edges) - 1)
    for i in range(len(edges) - 1 if projected else 0):
        source = 0 if o["div_val"] == 1 else i
        if o["tie_projs"][i]:
            outward[i] = inward[source]
            plain.repeated[f"crit.out_projs.{i}"] = f"word_emb.emb_projs.{source}"
        else:
            outward[i] = plain.draw(f"crit.out_projs.{i}", d, e // o["div_val"] ** i, std=0.4)
    return clustered_nll(hidden, targets, clusters(weights, biases, outward, edges, head), edges), z


def _attention_layer(plain: Plain, u: Tensor, past: Tensor, columns: int, p: float) -> Callable[[Tensor], Tensor]:
    """f: z (B, d, L) -> (B, d, L)"""
    o, batch, memory = plain.options, u.shape[0], past.shape[2]
    d, heads, width, length = o["d_model"], o["n_head"], o["d_head"], columns - memory
    b_w = plain.draw("func.dec_attn.r_w_bias", heads, width)[..., None]
    b_r = plain.draw("func.dec_attn.r_r_bias", heads, width)[..., None]
    qkv = plain.weight("func.dec_attn.qkv_net", 3 * d, d, 1, std=0.15)
    position = plain.weight("func.dec_attn.r_net", d, d, 1, std=0.15)
    out = plain.weight("func.dec_attn.o_net", d, d, 1, std=0.15), plain.draw("func.dec_attn.o_net.bias", d, std=0.06)
    inner = o["d_inner"]
    ff1 = (
        plain.weight("func.pos_ff.ff1_net", inner, d, 1, std=0.15),
        plain.draw("func.pos_ff.ff1_net.bias", inner, std=0.06),
    )
    ff2 = plain.weight("func.pos_ff.ff2_net", d, inner, 1, std=0.15), plain.draw("func.pos_ff.ff2_net.bias", d, std=0.06)
    drop_attention, drop_hidden = plain.mask("attn_out", batch, d, 1, p=p), plain.mask("ff_hidden", batch, inner, 1, p=p)
    drop_out = plain.mask("ff_out", batch, d, 1, p=p)

    angles = (
        torch.arange(columns - 1.0, -1, -1, dtype=torch.float64) / 10000 ** (torch.arange(0.0, d, 2).double() / d)[:, None]
    )
    positions = torch.cat((angles.sin(), angles.cos()))[None] * plain.mask("pos_emb", 1, d, 1, p=p)
    r = F.conv1d(positions, position).view(heads, width, columns)
    distance = memory + torch.arange(length)[:, None] - torch.arange(columns)  # (L, K)
    visible = (distance >= 0) & (distance < (o["local_size"] or 1000))
    places = (columns - 1 - distance).clamp(0, columns - 1)

    def norm(x: Tensor) -> Tensor:
        return F.layer_norm(x.mT, (d,)).mT

    def f(z: Tensor) -> Tensor:
        whole = torch.cat((past, z), dim=2)
        mixed = F.conv1d(norm(whole) if o["pre_lnorm"] else whole, qkv) + u
        q, k, v = (part.view(batch, heads, width, columns) for part in mixed.chunk(3, dim=1))
        q = q[..., memory:]
        by_content = torch.einsum("bnel,bnek->bnlk", q + b_w, k)
        by_position = torch.einsum("bnel,nek->bnlk", q + b_r, r).gather(-1, places.expand(batch, heads, -1, -1))
        scores = ((by_content + by_position) / math.sqrt(width)).masked_fill(~visible, -math.inf)
        read = torch.einsum("bnlk,bnek->bnel", scores.softmax(-1), v).reshape(batch, d, length)
        z = z + F.conv1d(read, *out) * drop_attention
        z = norm(z)  # before the second part where the norms come first, else behind the first
        y = z + F.conv1d(F.conv1d(z, *ff1).relu() * drop_hidden, *ff2) * drop_out
        return y if o["pre_lnorm"] else norm(y)

    return f


def trellisnet(plain: Plain, tokens: Tensor, targets: Tensor, past: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """(nll (B, L), z (B, 2H, L)) of tokens (B, L) behind one column (B, 2H, 1), with all dropouts p."""
    o, (batch, _length) = plain.options, tokens.shape
    h, k, ninp, nout, n_token = o["nhid"] + o["nout"], o["kernel_size"], o["ninp"], o["nout"], o["n_token"]
    for name, channels in (("func.full_conv", h), ("inject_conv", ninp)):
        mask = plain.mask(f"wdrop.{name}", 4 * h, channels, k, p=p)
        if k > 1:
            mask[..., -1] = 1
    table = plain.draw("encoder.weight", n_token, ninp)
    words = (table * plain.mask("embedding_rows", n_token, 1, p=p))[tokens] * plain.mask("word_emb", batch, 1, ninp, p=p)
    inject = plain.weight("trellisnet.inject_conv", 4 * h, ninp, k, std=0.1)
    u = F.conv1d(F.pad(words.mT, (k - 1, 0)), inject, plain.draw("trellisnet.inject_conv.bias", 4 * h))
    weight = plain.weight("trellisnet.func.full_conv", 4 * h, h, k, std=0.1)
    bias, mask = plain.draw("trellisnet.func.full_conv.bias", 4 * h), plain.mask("conv_input", batch, h, 1, p=p)
    history = past[:, :h].expand(-1, -1, (k - 1) * o["dilation"])

    def f(z: Tensor) -> Tensor:
        read = torch.cat((history, z[:, :h]), dim=2) * mask
        i, out, g, forget = (F.conv1d(read, weight, bias, dilation=o["dilation"]) + u).chunk(4, dim=1)
        before = torch.cat((past[:, h:], z[:, h:, :-1]), dim=2)
        cell = i.sigmoid() * g.tanh() + forget.sigmoid() * before
        return torch.cat((out.sigmoid() * cell.tanh(), cell), dim=1)

    z = iterated(f, torch.zeros_like(u[:, : 2 * h]))
    hidden = z[:, h - nout : h].mT * plain.mask("output", batch, 1, nout, p=p)
    experts = o["n_experts"]
    decoder = table if o["tie_weights"] else plain.draw("decoder.weight", n_token, ninp if experts else nout)
    plain.repeated |= {"decoder.weight": "encoder.weight"} if o["tie_weights"] else {}
    decoder_bias = plain.draw("decoder.bias", n_token, std=0.1)
    if not experts:
        edges, tails, same = [0, *plain.splits, n_token], len(plain.splits), torch.eye(nout, dtype=torch.float64)
        head = (plain.draw("crit.tail_vectors", tails, nout), plain.draw("crit.tail_bias", tails)) if tails else None
        heads = clusters([decoder], [decoder_bias], [same] * (tails + 1), edges, head)
        return clustered_nll(hidden, targets, heads, edges), z
    linear = {
        name: (plain.draw(f"mixsoft.{name}.weight", n, nout), plain.draw(f"mixsoft.{name}.bias", n))
        for name, n in (("prior", experts), ("latent", experts * ninp))
    }
    latent = torch.tanh(F.linear(hidden, *linear["latent"]) * plain.mask("latent", batch, 1, experts * ninp, p=p))
    each = F.linear(latent.unflatten(-1, (experts, ninp)), decoder, decoder_bias).softmax(-1)
    mixed = (F.linear(hidden, *linear["prior"]).softmax(-1)[..., None] * each).sum(-2)
    return -torch.log(mixed + 1e-8).gather(-1, targets[..., None])[..., 0], z
