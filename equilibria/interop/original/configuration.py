"""The configuration of a model from the tensors of its checkpoint, as far as they tell.

Shapes tell the sizes, names tell weight norm, experts and clusters, equal values tell what is tied. What no tensor tells is
given as an option, spelled as in the original's training scripts; an option that a tensor contradicts is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from equilibria.interop.original.names import Family, Release, original_name
from equilibria.interop.original.options import OriginalOptions, show
from equilibria.interop.original.reading import Reader
from equilibria.models.deq_transformer import DEQTransformerLM, TransformerConfig, TransformerShape
from equilibria.models.deq_trellisnet import DEQTrellisNetLM, TrellisConfig, TrellisShape
from equilibria.solution import UserError

UNLIMITED = 1000
"""How many positions one position sees in the original's Transformer where `local_size` is 0."""


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """What a checkpoint is."""

    shape: TransformerShape | TrellisShape
    """The model, but for its vocabulary."""
    n_token: int
    """Size of the vocabulary."""
    length: int
    """Tokens of each lane in one segment."""
    tensors: dict[str, Tensor]
    """All parameters by our names, tied ones under each of theirs."""
    found: dict[str, object] = field(default_factory=dict)
    """What the tensors tell, by the names of the original's options."""
    assumed: dict[str, object] = field(default_factory=dict)
    """What they do not tell, and what was taken for it, by the same names."""


def configure(
    named: Mapping[str, Tensor], options: OriginalOptions, *, release: Release = "2019", as_released: bool = True
) -> Configuration:
    """The configuration of the model with these tensors, which must be all of its parameters.

    Args:
        named: a state dict of the original, as `translate` returns it.
        options: what was given of the original's options.
        release: the code that wrote them.
        as_released: keep the original's slips in further training: dropout of the Transformer's output zeroes whole
            positions (`drop_positions`), in the code of 2019 no attention weight is dropped whatever `dropatt` is, and the
            last word of a TrellisNet's vocabulary does not learn as an input (`freeze_last_row`). Evaluation is the same
            either way.

    Raises:
        UserError: tensors, or tensors and options, contradict each other; it names both sides.

    >>> named = build(TransformerShape(d_model=8, n_head=2, d_inner=6), 20).state_dict()
    >>> found = configure(named, OriginalOptions(mem_len=16))
    >>> found.shape.d_inner, found.n_token
    (6, 20)
    """
    family: Family = "transformer" if "deq.block.content_bias" in named else "trellisnet"
    reader = Reader(named, options.given(family), family)
    try:
        if family == "transformer":
            shape, length = _transformer(reader, as_released, drops_attention=release == "2021" or not as_released)
        else:
            shape, length = _trellisnet(reader, as_released)
        tensors, n_token = _complete(reader, shape)
    except UserError:
        raise
    except ValueError as error:  # of a shape that makes no model
        raise UserError(f"the tensors make no model: {error}") from error
    return Configuration(
        shape=shape, n_token=n_token, length=length, tensors=tensors, found=reader.found, assumed=reader.assumed
    )


def _complete(reader: Reader, shape: TransformerShape | TrellisShape) -> tuple[dict[str, Tensor], int]:
    """The tensors, which must be the parameters of a model of this shape, and the size of its vocabulary."""
    n_token = reader.found["n_token"]
    assert isinstance(n_token, int)
    with torch.device("meta"):
        wanted = build(shape, n_token).state_dict()
    tensors = dict(reader.named)
    if isinstance(shape, TrellisShape) and shape.cutoffs and "softmax.cluster_weight" not in tensors:
        for name in ("softmax.cluster_weight", "softmax.cluster_bias"):  # which the original does not save
            tensors[name] = torch.zeros(wanted[name].shape, dtype=tensors["softmax.biases.0"].dtype)
    problems = []
    for name in {**wanted, **tensors}:
        theirs = original_name(name, reader.family)
        if name not in tensors:
            problems.append(f"{theirs} is missing")
        elif name not in wanted:
            problems.append(f"{theirs} does not belong to it")
        elif tensors[name].shape != wanted[name].shape:
            found, other = tuple(tensors[name].shape), tuple(wanted[name].shape)
            problems.append(f"{theirs} has shape {found}, but the others make it {other}")
    if problems:
        more = f"; and {len(problems) - 3} more such" if len(problems) > 3 else ""
        raise UserError(f"the tensors make no model of the original: {'; '.join(problems[:3])}{more}")
    return tensors, n_token


def build(shape: TransformerShape | TrellisShape, n_token: int) -> DEQTransformerLM | DEQTrellisNetLM:
    """A model of this shape, with fresh parameters and the default solver."""
    values: dict[str, Any] = {item.name: getattr(shape, item.name) for item in fields(shape)}
    if isinstance(shape, TransformerShape):
        return DEQTransformerLM(TransformerConfig(vocab_size=n_token, **values))
    return DEQTrellisNetLM(TrellisConfig(vocab_size=n_token, **values))


def _transformer(reader: Reader, as_released: bool, *, drops_attention: bool) -> tuple[TransformerShape, int]:
    d_model = reader.size("inject.weight", dims=2)[1]
    n_head, d_head = reader.size("deq.block.content_bias", dims=2)
    if n_head * d_head != d_model:
        raise UserError(
            f"func.dec_attn.r_w_bias has {n_head} heads of width {d_head}, but inject_conv.weight a d_model of {d_model}; "
            "the original injects into queries, keys and values of width d_model"
        )
    d_inner = reader.size("deq.block.ff_in.weight", dims=2)[0]
    for option, value in (("d_model", d_model), ("n_head", n_head), ("d_head", d_head), ("d_inner", d_inner)):
        reader.tell(option, value)
    cutoffs, div_val, d_embed = _clusters(reader, d_model)
    weight_norm = reader.count("deq.block.qkv.parametrizations.") > 0
    reader.tell("wnorm", weight_norm)
    shape = TransformerShape(
        d_model=d_model,
        n_head=n_head,
        d_inner=d_inner,
        d_embed=None if d_embed == d_model else d_embed,
        div_val=div_val,
        cutoffs=cutoffs,
        weight_norm=weight_norm,
        tie_weights=_tied(reader, reader.count("embedding.tables.")),
        tie_projections=_tied_projections(reader),
        mem_len=reader.ask_count("mem_len", 150, lowest=0),
        local_size=reader.ask_count("local_size", 0, lowest=0) or UNLIMITED,
        pre_norm=bool(reader.ask("pre_lnorm", False)),
        dropout=reader.ask_share("dropout"),
        attention_dropout=reader.ask_share("dropatt") if drops_attention else 0.0,
        subseq_len=reader.ask_count("subseq_len", 0, lowest=0) or None,
        drop_positions=as_released,
        stored_frequencies="deq.block.frequencies" in reader.named,
    )
    return shape, reader.ask_count("tgt_len", 150)


def _clusters(reader: Reader, d_model: int) -> tuple[tuple[int, ...], int, int]:
    """Cutoffs, div_val and d_embed."""
    tables = [reader.size(f"embedding.tables.{i}", dims=2) for i in range(max(1, reader.count("embedding.tables.")))]
    widths = [width for _, width in tables]
    n_token = sum(rows for rows, _ in tables)
    reader.tell("n_token", n_token)
    reader.tell("d_embed", widths[0])
    clusters = reader.size("softmax.cluster_weight", dims=2)[0] if reader.count("softmax.cluster_weight") else 0
    if len(tables) > 1:
        cutoffs = tuple(accumulate(rows for rows, _ in tables[:-1]))
        div_val = _div_val(widths)
        reader.tell("cutoffs", cutoffs)
    else:
        # A projection that is not needed is there only if div_val is not 1; of one cluster it divides nothing.
        needless = widths[0] == d_model and reader.count("embedding.projections.") > 0
        div_val = 2 if needless and not clusters else 1
        cutoffs = _given_cutoffs(reader, clusters, n_token)
    if len(tables) > 1 or div_val == 1:
        reader.tell("div_val", div_val)
    return cutoffs, div_val, widths[0]


def _div_val(widths: list[int]) -> int:
    for div_val in range(2, widths[0] + 1):
        if [widths[0] // div_val**i for i in range(len(widths))] == widths:
            return div_val
    raise UserError(f"the tables of word_emb have widths {widths}, which are not the first divided by powers of a number")


def _given_cutoffs(reader: Reader, clusters: int, n_token: int) -> tuple[int, ...]:
    """Cutoffs of words that share one table: their number is known, not their places."""
    given = reader.given.get("cutoffs")
    cutoffs = tuple(given) if isinstance(given, tuple) else ()
    if len(cutoffs) != clusters:
        have = f"--cutoffs is {show(cutoffs)}" if cutoffs else "no tensor tells where they begin"
        rows = original_name("softmax.cluster_weight", reader.family)
        remedy = f"give {clusters} --cutoffs" if clusters else "leave the option out"
        raise UserError(f"{have}, but {rows} has {clusters} clusters of rarer words; {remedy}")
    if any(left >= right for left, right in zip((0, *cutoffs), (*cutoffs, n_token), strict=True)):
        raise UserError(
            f"--cutoffs is {show(cutoffs)}, but the tensors have {n_token} words; give increasing numbers below that"
        )
    reader.found["cutoffs"] = cutoffs
    return cutoffs


def _tied(reader: Reader, tables: int) -> bool:
    tied = [reader.equal(f"embedding.tables.{i}", f"softmax.weights.{i}") for i in range(tables)]
    if any(tied) and not all(tied):
        i, k = tied.index(True), tied.index(False)
        raise UserError(
            f"crit.out_layers.{i}.weight is word_emb.emb_layers.{i}.weight, but crit.out_layers.{k}.weight is not "
            f"word_emb.emb_layers.{k}.weight; the original ties all or none"
        )
    reader.tell("tied", all(tied))
    return all(tied)


def _tied_projections(reader: Reader) -> tuple[bool, ...] | None:
    own, shared = reader.count("softmax.projections."), reader.count("embedding.projections.")
    if not own:
        return None
    names = [(f"softmax.projections.{i}", f"embedding.projections.{0 if shared == 1 else i}") for i in range(own)]
    tied = tuple(reader.equal(*pair) for pair in names)
    reader.tell("tie_projs", tied)
    return tied


def _trellisnet(reader: Reader, as_released: bool) -> tuple[TrellisShape, int]:
    n_token, d_embed = reader.size("embedding.weight", dims=2)
    gates, state, kernel_size = reader.size("deq.block.conv.weight", dims=3)
    if gates != 4 * state:
        raise UserError(f"trellisnet.func.full_conv reads {state} channels and writes {gates}, not four times as many")
    n_experts = reader.size("softmax.prior.weight", dims=2)[0] if reader.count("softmax.prior.") else 0
    decoder = "softmax.prior.weight" if n_experts else "softmax.weights.0"
    d_output = reader.size(decoder, dims=2)[1]
    if d_output >= state:
        theirs = original_name(decoder, "trellisnet")
        raise UserError(
            f"{theirs} reads {d_output} channels, but trellisnet.func.full_conv has {state}, some of them hidden"
        )
    for option, value in (
        *(("n_token", n_token), ("d_embed", d_embed), ("nhid", state - d_output), ("nout", d_output)),
        *(("ksize", kernel_size), ("n_experts", n_experts)),
    ):
        reader.tell(option, value)
    weight_norm = reader.count("deq.block.conv.parametrizations.") > 0
    reader.tell("wnorm", weight_norm)
    tied = reader.equal("embedding.weight", "softmax.weight" if n_experts else "softmax.weights.0")
    reader.tell("tied", tied)
    shape = TrellisShape(
        d_embed=d_embed,
        d_hidden=state - d_output,
        d_output=d_output,
        kernel_size=kernel_size,
        dilation=reader.ask_count("dilation", 1),
        n_experts=n_experts,
        weight_norm=weight_norm,
        tie_weights=tied,
        cutoffs=_splits(reader, n_token),
        word_dropout=reader.ask_share("emb_dropout"),
        input_dropout=reader.ask_share("dropouti"),
        hidden_dropout=reader.ask_share("dropouth"),
        output_dropout=reader.ask_share("dropout"),
        latent_dropout=_latent_dropout(reader, n_experts),
        weight_dropout=reader.ask_share("wdrop"),
        subseq_len=reader.ask_count("subseq_len", 0, lowest=0) or None,
        freeze_last_row=as_released,
    )
    return shape, reader.ask_count("seq_len", 100)


def _latent_dropout(reader: Reader, n_experts: int) -> float:
    given = reader.given.get("dropoutl")
    if given and not n_experts:
        raise UserError(
            f"--dropoutl is {given}, but the tensors have no mixture of softmaxes (mixsoft); leave the option out"
        )
    return reader.ask_share("dropoutl") if n_experts else 0.0


def _splits(reader: Reader, n_token: int) -> tuple[int, ...]:
    """Of the split softmax, whose clusters only hand-made checkpoints hold."""
    if reader.count("softmax.cluster_weight"):
        return _given_cutoffs(reader, reader.size("softmax.cluster_weight", dims=2)[0], n_token)
    given = reader.given.get("cutoffs")
    if not isinstance(given, tuple) or not given:
        reader.assumed["cutoffs"] = ()
        return ()
    return _given_cutoffs(reader, len(given), n_token)
