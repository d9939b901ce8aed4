"""Parameters of the original code under our names.

The original's models keep one set of parameters under several names: `func` is the layer, `deq.func`, `deqback.func`,
`func_copy` and `deqback.func_copy` are the same tensors again (the last two with weight norm already applied, as of the
last forward pass). A state dict holds all of them. Here each tensor has one name, its first; the others are checked
against it and dropped.

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
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

Family = Literal["transformer", "trellisnet"]

_COPIES = re.compile(r"^(trellisnet\.)?(?:deq\.func|deqback\.func|(?:deqback\.)?(func_copy))\.")
_RULES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"word_emb\.emb_layers\.(\d+)\.weight", r"embedding.tables.\1"),
        (r"word_emb\.emb_projs\.(\d+)", r"embedding.projections.\1"),
        (r"(?:trellisnet\.)?inject_conv\.(weight|weight_g|weight_v|bias)", r"inject.\1"),
        (r"func\.dec_attn\.qkv_net\.(weight|weight_g|weight_v)", r"deq.block.qkv.\1"),
        (r"func\.dec_attn\.r_net\.(weight|weight_g|weight_v)", r"deq.block.position.\1"),
        (r"func\.dec_attn\.o_net\.(weight|weight_g|weight_v|bias)", r"deq.block.attention_out.\1"),
        (r"func\.dec_attn\.r_w_bias", r"deq.block.content_bias"),
        (r"func\.dec_attn\.r_r_bias", r"deq.block.position_bias"),
        (r"func\.pos_ff\.ff1_net\.(weight|weight_g|weight_v|bias)", r"deq.block.ff_in.\1"),
        (r"func\.pos_ff\.ff2_net\.(weight|weight_g|weight_v|bias)", r"deq.block.ff_out.\1"),
        (r"crit\.out_layers\.(\d+)\.weight", r"softmax.weights.\1"),
        (r"crit\.out_layers\.(\d+)\.bias", r"softmax.biases.\1"),
        (r"crit\.out_projs\.(\d+)", r"softmax.projections.\1"),
        (r"crit\.(cluster_weight|cluster_bias)", r"softmax.\1"),
        (r"encoder\.weight", r"embedding.weight"),
        (r"trellisnet\.func\.full_conv\.(weight|weight_g|weight_v|bias)", r"deq.block.conv.\1"),
        (r"mixsoft\.(prior|latent)\.(weight|bias)", r"softmax.\1.\2"),
        (r"crit\.tail_vectors", r"softmax.cluster_weight"),
        (r"crit\.tail_bias", r"softmax.cluster_bias"),
    )
]
_DECODER = {"decoder.weight": "softmax.weights.0", "decoder.bias": "softmax.biases.0"}
_DECODER_OF_EXPERTS = {"decoder.weight": "softmax.weight", "decoder.bias": "softmax.bias"}
_NORMED = {".weight_g": ".parametrizations.weight.original0", ".weight_v": ".parametrizations.weight.original1"}


def family(names: Mapping[str, object]) -> Family:
    """Which of the two models has parameters of these names.

    Raises:
        ValueError: neither has.

    >>> family({"word_emb.emb_layers.0.weight": ..., "func.dec_attn.qkv_net.weight": ...})
    'transformer'
    """
    plain = {name.removeprefix("module.") for name in names}
    if any(name.startswith("func.dec_attn.") for name in plain):
        return "transformer"
    if any(name.startswith("trellisnet.") for name in plain):
        return "trellisnet"
    some = f": its names are {', '.join(list(names)[:3])}" if names else ""
    raise ValueError(f"neither a DEQ-Transformer nor a DEQ-TrellisNet of the original code{some}")


def first_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor once, under the original's first name for it, spelled as in 2019 and without weight drop.

    Raises:
        ValueError: a repeated tensor differs from the first.

    >>> one = torch.ones(1)
    >>> list(first_names({"module.func.dec_attn.r_w_bias": one, "module.deq.func.dec_attn.r_w_bias": one}))
    ['func.dec_attn.r_w_bias']
    """
    if tensors and all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    first: dict[str, Tensor] = {}
    spelled: dict[str, str] = {}
    repeats: list[tuple[str, str, Tensor]] = []
    for name, tensor in tensors.items():
        plain = _plain(name)
        if plain == "pos_emb.inv_freq":
            continue
        if _COPIES.match(plain) or name.startswith("mixsoft.decoder.") or plain in first:
            repeats.append((name, plain, tensor))
        else:
            first[plain], spelled[plain] = tensor, name
    for name, plain, tensor in repeats:
        _add_repeat(first, spelled, name, plain, tensor)
    return first


def translate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The original's state dict, or its gradients, under our names and in our shapes.

    Tied parameters keep both names where the original lists both. The Transformer's kernels of size one become matrices.

    Args:
        tensors: by the names of the original's `state_dict()` or `named_parameters()`.

    Raises:
        ValueError: a name is not one of the original's, or a repeated tensor differs from the first.

    >>> list(translate({"inject_conv.weight": torch.zeros(6, 2, 1)}).items())[0][1].shape
    torch.Size([6, 2])
    """
    first = first_names(tensors)
    experts = any(name.startswith("mixsoft.") for name in first)
    translated: dict[str, Tensor] = {}
    unknown: list[str] = []
    for name, tensor in first.items():
        ours = _our_name(name, experts)
        if ours is None:
            unknown.append(name)
        else:
            translated[ours] = _our_shape(name, tensor)
    if unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise ValueError(f"the original's models have no parameter {', '.join(unknown[:3])}{more}")
    return translated


def _plain(name: str) -> str:
    """Without what wrappers add, and as spelled in 2019."""
    name = name.replace("trellisnet.module.", "trellisnet.", 1).replace("mixsoft.decoder.", "decoder.", 1)
    name = re.sub(r"\.(weight|weight_v)_raw$", r".\1", name)
    return re.sub(r"((?:emb|out)_projs\.\d+)\.weight$", r"\1", name)


def _add_repeat(first: dict[str, Tensor], spelled: dict[str, str], name: str, plain: str, tensor: Tensor) -> None:
    """Check one repeated tensor against its first, which it becomes if that is missing."""
    copy = _COPIES.match(plain)
    original = _COPIES.sub(r"\1func.", plain)
    direction = first.get(original + "_v")
    if copy and copy.group(2) and direction is not None:  # normalised, and as old as the last forward pass
        if tensor.shape != direction.shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, but {original}_v {tuple(direction.shape)}")
        return
    if original not in first:
        first[original], spelled[original] = tensor, name
    elif not _same(tensor, first[original]):
        raise ValueError(f"{name} and {spelled[original]} are one tensor in the original, but differ here")


def _same(one: Tensor, other: Tensor) -> bool:
    """Equal bit for bit, NaN to NaN; at once where both are the same memory."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if one.data_ptr() == other.data_ptr() and one.stride() == other.stride():
        return True
    return torch.equal(one, other) or torch.allclose(one, other, rtol=0.0, atol=0.0, equal_nan=True)


def _our_name(name: str, experts: bool) -> str | None:
    decoder = (_DECODER_OF_EXPERTS if experts else _DECODER).get(name)
    if decoder is not None:
        return decoder
    for pattern, replacement in _RULES:
        match = pattern.fullmatch(name)
        if match:
            ours = match.expand(replacement)
            for theirs, normed in _NORMED.items():
                if ours.endswith(theirs):
                    return ours.removesuffix(theirs) + normed
            return ours
    return None


def _our_shape(name: str, tensor: Tensor) -> Tensor:
    """(out, in, 1) becomes (out, in): the Transformer's convolutions are linear maps here, TrellisNet's are not."""
    matrix = not name.startswith("trellisnet.") and tensor.dim() == 3 and tensor.shape[-1] == 1
    return tensor.squeeze(-1) if matrix else tensor
