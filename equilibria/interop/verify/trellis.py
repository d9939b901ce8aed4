"""DEQ-TrellisNets of 2019."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from equilibria.interop.verify.cases import Case
from equilibria.interop.verify.draws import masks
from equilibria.interop.verify.language_models import Reading, prepare, recorded_state
from equilibria.interop.verify.report import Report
from equilibria.interop.verify.tolerances import Limits
from equilibria.interop.verify.traces import check_traces
from equilibria.models.deq_trellisnet import DEQTrellisNetLM, TrellisConfig
from equilibria.nn.dropout import FrozenDropout
from equilibria.nn.mixture_of_softmaxes import MixtureOfSoftmaxes
from equilibria.nn.parametrizations import DropConnect

MEMORY = ("mem",)
DROPOUTS = {
    "emb_dropout": "word_dropout",
    "dropouti": "input_dropout",
    "dropouth": "hidden_dropout",
    "dropout": "output_dropout",
    "dropoutl": "latent_dropout",
    "wdrop": "weight_dropout",
}


def check(case: Case, dtype: torch.dtype, limits: Limits, report: Report) -> None:
    depth, pieces = case.config["constructor"]["n_layer"], case.config["sub_subseq_len"]
    segment = case.config.get("train_segment", 1)
    reading = _reading(case, dtype, limits, report)
    reading.evaluate("full.")
    reading.evaluate("sub.", subseq_len=pieces)
    reading.evaluate("stacked.", depth=depth)
    reading.train("train_full", segment)
    reading.train("train_sub", segment, subseq_len=pieces)
    reading.train("pretrain", segment, depth=depth)
    if case.has("train_dropout.safetensors"):
        dropped = _reading(case, dtype, limits, report, case.config["checks"].get("train_dropout", {}))
        assert isinstance(dropped.model, DEQTrellisNetLM)
        recorded = case.tensors("train_dropout", dtype).under("mask.")
        with masks(places(dropped.model, recorded)):
            dropped.train("train_dropout", segment)
    if dtype == torch.float64 and case.has("broyden_trace.json"):
        check_traces(reading, case.json("broyden_trace.json"), segment)


def config_of(
    options: Mapping[str, Any], splits: list[int] | None, dropouts: Mapping[str, Any] | None = None
) -> TrellisConfig:
    """Of the original's constructor arguments, and of the split softmax that its training script adds."""
    return TrellisConfig(
        vocab_size=options["n_token"],
        d_embed=options["ninp"],
        d_hidden=options["nhid"],
        d_output=options["nout"],
        kernel_size=options["kernel_size"],
        dilation=options["dilation"],
        weight_norm=options["wnorm"],
        tie_weights=options["tie_weights"],
        n_experts=options["n_experts"],
        cutoffs=tuple(splits or ()),
        **{ours: (dropouts or {}).get(theirs, 0.0) for theirs, ours in DROPOUTS.items()},
    )


def _reading(
    case: Case, dtype: torch.dtype, limits: Limits, report: Report, dropouts: Mapping[str, Any] | None = None
) -> Reading:
    splits = case.config.get("split_softmax_splits")
    config = config_of(case.config["constructor"], splits, dropouts)
    model = prepare(DEQTrellisNetLM(config), recorded_state(case), dtype, limits)
    return Reading(model, case, dtype, limits, report, MEMORY, decoded=splits is None)


def places(model: DEQTrellisNetLM, recorded: Mapping[str, Tensor]) -> dict[FrozenDropout, Tensor]:
    """Which of the model's dropouts draws which recorded mask. Channels stand before time there in the block's alone."""
    places: dict[FrozenDropout, Tensor] = {}
    for name, mask in recorded.items():
        if name == "embedding_rows":
            places[model.word_dropout.drop] = mask
        elif name == "word_emb":
            places[model.input_dropout] = mask
        elif name == "conv_input":
            places[model.block.dropout] = mask.mT
        elif name == "output":
            places[model.output_dropout] = mask
        elif name in ("wdrop.func.full_conv", "wdrop.inject_conv"):
            convolution = model.inject if name == "wdrop.inject_conv" else model.block.conv
            drops = [m.drop for m in convolution.modules() if isinstance(m, DropConnect) and m.drop.p > 0]
            places |= dict.fromkeys(drops, mask)
        elif isinstance(model.softmax, MixtureOfSoftmaxes) and mask.shape[-1] == model.softmax.latent.out_features:
            places[model.softmax.drop] = mask
        else:
            raise ValueError(f"the recorded mask {name} belongs to no dropout of the model")
    return places
