"""DEQ-Transformers of 2019 and 2021."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from equilibria.interop.original.configuration import UNLIMITED
from equilibria.interop.verify.cases import Case
from equilibria.interop.verify.draws import methods
from equilibria.interop.verify.language_models import Reading, prepare, recorded_state
from equilibria.interop.verify.report import Report
from equilibria.interop.verify.tolerances import Limits
from equilibria.interop.verify.traces import check_traces
from equilibria.models.block import DropoutMasks
from equilibria.models.deq_transformer import DEQTransformerLM, TransformerConfig

MEMORY = ("mem_z0", "mem_u0")


def check_2019(case: Case, dtype: torch.dtype, limits: Limits, report: Report) -> None:
    options = case.config["constructor"]
    reading = _reading(case, dtype, limits, report)
    pieces, segment = case.config["sub_subseq_len"], case.config.get("train_segment", 1)
    reading.evaluate("full.")
    reading.evaluate("sub.", subseq_len=pieces)
    reading.evaluate("stacked_eval_n_layer.", depth=options["eval_n_layer"])
    reading.evaluate("stacked_n_layer_step1.", depth=options["n_layer"])
    reading.train("train_full", segment)
    reading.train("train_sub", segment, subseq_len=pieces)
    reading.train("pretrain", segment, depth=options["n_layer"])
    if case.has("train_dropout.safetensors"):
        p = case.config["checks"].get("train_dropout", {}).get("dropout", 0.0)
        dropped = _reading(case, dtype, limits, report, dropout=p)
        masks = case.tensors("train_dropout", dtype).under("mask.")
        assert isinstance(dropped.model, DEQTransformerLM)
        with recorded_draws(dropped.model, masks):
            dropped.train("train_dropout", segment)
    if dtype == torch.float64 and case.has("broyden_trace.json"):
        check_traces(reading, case.json("broyden_trace.json"), segment)


def check_2021(case: Case, dtype: torch.dtype, limits: Limits, report: Report) -> None:
    reading = _reading(case, dtype, limits, report)
    segment = case.config.get("train_segment", 1)
    reading.evaluate("")
    reading.train("train", segment, kind="")
    reading.train("pretrain", segment, kind="", depth=case.config["constructor"]["n_layer"])
    if "jac_vector" in case.tensors("train", dtype):
        reading.train_jacobian("train", segment)


def _reading(case: Case, dtype: torch.dtype, limits: Limits, report: Report, dropout: float = 0.0) -> Reading:
    state = recorded_state(case)
    config = replace(
        config_of(case.config["constructor"]),
        dropout=dropout,
        drop_positions=True,
        stored_frequencies="deq.block.frequencies" in state,
    )
    model = prepare(DEQTransformerLM(config), state, dtype, limits)
    return Reading(model, case, dtype, limits, report, MEMORY)


def config_of(options: Mapping[str, Any]) -> TransformerConfig:
    """Of the original's constructor arguments. It has a flag for each cluster's projection, ours the same."""
    cutoffs = tuple(options["cutoffs"])
    ties = list(options["tie_projs"])[: len(cutoffs) + 1]
    return TransformerConfig(
        vocab_size=options["n_token"],
        d_model=options["d_model"],
        n_head=options["n_head"],
        d_inner=options["d_inner"],
        d_embed=options["d_embed"],
        div_val=options["div_val"],
        cutoffs=cutoffs,
        tie_weights=options["tie_weights"],
        tie_projections=(*ties, *[False] * (len(cutoffs) + 1 - len(ties))),
        mem_len=options["mem_len"],
        local_size=options["local_size"] or UNLIMITED,
        pre_norm=options["pre_lnorm"],
        weight_norm=options["wnorm"],
    )


def recorded_draws(model: DEQTransformerLM, masks: Mapping[str, Tensor]) -> AbstractContextManager[None]:
    """The recorded masks in the place of drawn ones: (B, channels, 1) there, (B, 1, channels) here."""
    drawn = DropoutMasks(
        positions=masks["pos_emb"].mT[0],
        attention=masks["attn_out"].mT,
        hidden=masks["ff_hidden"].mT,
        output=masks["ff_out"].mT,
    )
    return methods(
        {
            model: {"draw_masks": lambda injection: drawn},
            model.word_dropout: {"mask": lambda like: masks["word_emb"]},
            model.output_dropout: {"mask": lambda like: masks["output"].mT},
        }
    )
