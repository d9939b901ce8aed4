"""Parameters of the original code under our names.

The original's models keep one set of parameters under several names: `func` is the layer, `deq.func` and `deqback.func`
are the same tensors again, and `func_copy` is a copy of its weights, with weight norm and weight drop already applied, as
old as the last forward pass. A state dict holds all of them. Here each tensor has one name, its first; `deq.func` and
`deqback.func` are checked against it, and the copies, which the original overwrites before it reads them, are dropped.

    first_names(tensors)  the original's tensors under their first names
    translate(tensors)    the same under our names, in our shapes

Both serve state dicts and gradients (strip what stands before the names first), of both model families, as written in
2019 and in 2021, wrapped in `DataParallel` or `WeightDrop` or not. Nothing here looks at options: the names tell.

    original                                ours
    word_emb.emb_layers.I.weight            embedding.tables.I
    word_emb.emb_projs.I[.weight]           embedding.projections.I
    inject_conv                             inject
    func.dec_attn.{qkv,r,o}_net             deq.block.{qkv,position,attention_out}
    func.dec_attn.{r_w,r_r}_bias            deq.block.{content,position}_bias
    func.pos_ff.{ff1,ff2}_net               deq.block.{ff_in,ff_out}
    pos_emb.inv_freq                        deq.block.frequencies, where rounded
    crit.out_layers.I.{weight,bias}         softmax.{weights,biases}.I
    crit.out_projs.I[.weight]               softmax.projections.I
    crit.cluster_{weight,bias}              softmax.cluster_{weight,bias}

    encoder.weight                          embedding.weight
    trellisnet.inject_conv                  inject
    trellisnet.func.full_conv               deq.block.conv
    decoder.{weight,bias}                   softmax.{weights,biases}.0, with experts softmax.{weight,bias}
    mixsoft.{prior,latent}                  softmax.{prior,latent}
    crit.tail_{vectors,bias}                softmax.cluster_{weight,bias}

    weight_g, weight_v                      parametrizations.weight.original0, .original1
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor

from equilibria.nn.relative_attention import sinusoidal_frequencies

Family = Literal["transformer", "trellisnet"]
Release = Literal["2019", "2021"]

# `#` stands for a number, `@` for a parameter of a linear map or convolution.
_NAMES = (
    ("word_emb.emb_layers.#.weight", "embedding.tables.#"),
    ("word_emb.emb_projs.#", "embedding.projections.#"),
    ("inject_conv.@", "inject.@"),
    ("func.dec_attn.qkv_net.@", "deq.block.qkv.@"),
    ("func.dec_attn.r_net.@", "deq.block.position.@"),
    ("func.dec_attn.o_net.@", "deq.block.attention_out.@"),
    ("func.dec_attn.r_w_bias", "deq.block.content_bias"),
    ("func.dec_attn.r_r_bias", "deq.block.position_bias"),
    ("pos_emb.inv_freq", "deq.block.frequencies"),
    ("func.pos_ff.ff1_net.@", "deq.block.ff_in.@"),
    ("func.pos_ff.ff2_net.@", "deq.block.ff_out.@"),
    ("crit.out_layers.#.weight", "softmax.weights.#"),
    ("crit.out_layers.#.bias", "softmax.biases.#"),
    ("crit.out_projs.#", "softmax.projections.#"),
    ("crit.cluster_weight", "softmax.cluster_weight"),
    ("crit.cluster_bias", "softmax.cluster_bias"),
)
_TRELLISNET_NAMES = (
    ("encoder.weight", "embedding.weight"),
    ("trellisnet.inject_conv.@", "inject.@"),
    ("trellisnet.func.full_conv.@", "deq.block.conv.@"),
    ("decoder.weight", "softmax.weights.0"),
    ("decoder.bias", "softmax.biases.0"),
    ("crit.tail_vectors", "softmax.cluster_weight"),
    ("crit.tail_bias", "softmax.cluster_bias"),
)
_EXPERTS_NAMES = (
    ("decoder.weight", "softmax.weight"),
    ("decoder.bias", "softmax.bias"),
    ("mixsoft.prior.@", "softmax.prior.@"),
    ("mixsoft.latent.@", "softmax.latent.@"),
)
_LEAVES = {
    "weight": "weight",
    "bias": "bias",
    "weight_g": "parametrizations.weight.original0",
    "weight_v": "parametrizations.weight.original1",
}


def family(names: Iterable[str]) -> Family:
    """Which of the two models has parameters of these names.

    Raises:
        ValueError: neither has.

    >>> family(["word_emb.emb_layers.0.weight", "func.dec_attn.qkv_net.weight"])
    'transformer'
    """
    names = list(names)
    plain = [_plain(name.removeprefix("module.")) for name in names]
    if any(name.startswith("func.dec_attn.") for name in plain):
        return "transformer"
    if any(name.startswith("trellisnet.") for name in plain):
        return "trellisnet"
    some = f"; its names are {', '.join(names[:3])}" if names else ""
    raise ValueError(f"this is neither a DEQ-Transformer nor a DEQ-TrellisNet of the original code{some}")


def release(tensors: Mapping[str, Tensor]) -> Release:
    """Which code wrote a state dict: the linear maps of a feed-forward part are convolutions in 2019, matrices in 2021.

    >>> release({"func.pos_ff.ff1_net.weight": torch.zeros(6, 2)})
    '2021'
    """
    matrices = (name.endswith(("ff1_net.weight", "ff1_net.weight_v")) and t.dim() == 2 for name, t in tensors.items())
    return "2021" if any(matrices) else "2019"


def first_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor once, under the original's first name for it, spelled as in 2019 and without weight drop.

    The frequencies of the positions are left out where they are 10000^(-2i / d) to the last digits of float64, and stay
    where they were rounded, as in a checkpoint in float32: a model in float64 then needs them, `stored_frequencies`.

    Raises:
        ValueError: a repeated tensor differs from the first, or a copy has another shape.

    >>> one = torch.ones(1)
    >>> list(first_names({"module.func.dec_attn.r_w_bias": one, "module.deq.func.dec_attn.r_w_bias": one}))
    ['func.dec_attn.r_w_bias']
    """
    first: dict[str, Tensor] = {}
    spelled: dict[str, str] = {}
    copies: dict[str, Tensor] = {}
    wrapped = all(name.startswith("module.") for name in tensors)
    for name, tensor in tensors.items():
        plain = _plain(name.removeprefix("module.") if wrapped else name)
        if plain == "pos_emb.inv_freq" and _are_exact(tensor):
            continue
        if "func_copy." in plain:
            copies[name] = tensor
        elif plain not in first:
            first[plain], spelled[plain] = tensor, name
        elif not _same(tensor, first[plain]):
            raise ValueError(f"{name} and {spelled[plain]} are one tensor in the original, but differ here")
    for name, copy in copies.items():
        plain = re.sub(r"(deqback\.)?func_copy\.", "func.", _plain(name.removeprefix("module.") if wrapped else name))
        original = first.get(plain, first.get(f"{plain}_v"))
        if original is not None and original.shape != copy.shape:
            raise ValueError(f"{name} has shape {tuple(copy.shape)}, but what it copies {tuple(original.shape)}")
    return first


def translate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The original's state dict, or its gradients, under our names and in our shapes.

    Tied parameters keep both names where the original lists both. The Transformer's kernels of size one become matrices.

    Args:
        tensors: by the names of the original's `state_dict()` or `named_parameters()`.

    Raises:
        ValueError: a name is not one of the original's, a repeated tensor differs from the first, or a copy has another
            shape.

    >>> {name: tensor.shape for name, tensor in translate({"inject_conv.weight": torch.zeros(6, 2, 1)}).items()}
    {'inject.weight': torch.Size([6, 2])}
    """
    first = first_names(tensors)
    experts = any(name.startswith("mixsoft.") for name in first)
    translated: dict[str, Tensor] = {}
    unknown: list[str] = []
    for name, tensor in first.items():
        ours = our_name(name, experts=experts)
        if ours is None:
            unknown.append(name)
        else:
            translated[ours] = _our_shape(name, tensor)
    if unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise ValueError(f"the original's models have no parameter {', '.join(unknown[:3])}{more}")
    return translated


def our_name(name: str, *, experts: bool = False) -> str | None:
    """Our name of a parameter that the original calls `name` first; None for none of its parameters.

    Args:
        name: as of `first_names`.
        experts: the model is a DEQ-TrellisNet with a mixture of softmaxes.

    >>> our_name("func.dec_attn.qkv_net.weight_v")
    'deq.block.qkv.parametrizations.weight.original1'
    """
    table = (_EXPERTS_NAMES if experts else ()) + _TRELLISNET_NAMES + _NAMES
    return _look_up(name, table, _LEAVES)


def original_name(name: str, model: Family) -> str:
    """The original's first name of one of our parameters; the name as it is if it has none.

    >>> original_name("deq.block.qkv.weight", "transformer")
    'func.dec_attn.qkv_net.weight'
    """
    table = _NAMES if model == "transformer" else _TRELLISNET_NAMES + _EXPERTS_NAMES
    return _look_up(name, [(ours, theirs) for theirs, ours in table], {v: k for k, v in _LEAVES.items()}) or name


def _look_up(name: str, table: Iterable[tuple[str, str]], leaves: Mapping[str, str]) -> str | None:
    leaf = "|".join(map(re.escape, leaves))
    for template, translation in table:
        pattern = re.escape(template).replace(re.escape("#"), r"(?P<number>\d+)").replace("@", f"(?P<leaf>{leaf})")
        match = re.fullmatch(pattern, name)
        if match:
            parts = match.groupdict()
            return translation.replace("#", parts.get("number", "")).replace("@", leaves.get(parts.get("leaf", ""), ""))
    return None


def _plain(name: str) -> str:
    """The first name of a parameter, spelled as in 2019 and without what wrappers add. A copy stays one."""
    name = name.replace("trellisnet.module.", "trellisnet.", 1).replace("mixsoft.decoder.", "decoder.", 1)
    name = re.sub(r"^(trellisnet\.)?(?:deq|deqback)\.func\.", r"\1func.", name)
    name = re.sub(r"\.(weight|weight_v)_raw$", r".\1", name)
    return re.sub(r"((?:emb|out)_projs\.\d+)\.weight$", r"\1", name)


def _are_exact(frequencies: Tensor) -> bool:
    """Whether the frequencies of the positions are what they are to the last digits of float64."""
    exact = sinusoidal_frequencies(2 * frequencies.numel(), like=torch.empty(0, dtype=torch.float64))
    return frequencies.dim() == 1 and torch.allclose(frequencies.double(), exact, rtol=1e-12, atol=0.0)


def _same(one: Tensor, other: Tensor) -> bool:
    """Equal bit for bit, NaN to NaN."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(one, other) or torch.allclose(one, other, rtol=0.0, atol=0.0, equal_nan=True)


def _our_shape(name: str, tensor: Tensor) -> Tensor:
    """(out, in, 1) becomes (out, in): the Transformer's convolutions are linear maps here, TrellisNet's are not."""
    matrix = not name.startswith("trellisnet.") and tensor.dim() == 3 and tensor.shape[-1] == 1
    return tensor.squeeze(-1) if matrix else tensor
