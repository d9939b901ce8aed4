"""Checkpoints in the containers that the original writes, and the losses of the models in them."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from equilibria.interop.original.checkpoint import read_checkpoint
from equilibria.interop.original.configuration import Configuration, build, configure
from equilibria.interop.original.names import translate
from equilibria.interop.original.options import OriginalOptions
from equilibria.interop.verify.cases import Case
from equilibria.interop.verify.language_models import Reading, prepare
from equilibria.interop.verify.report import Report
from equilibria.interop.verify.tolerances import DEFAULTS, Limits
from equilibria.interop.verify.transformer import MEMORY as TRANSFORMER_MEMORY
from equilibria.interop.verify.trellis import MEMORY as TRELLIS_MEMORY
from equilibria.models.deq_transformer import DEQTransformerLM


def check(case: Case, dtype: torch.dtype, limits: Limits, report: Report) -> None:
    files = [name for name in case.config["files"] if not name.endswith(".safetensors")]
    states = {name: read_checkpoint(case.folder / name) for name in files}
    first = states[files[0]]
    for name, state in states.items():
        shapes = {key: list(tensor.shape) for key, tensor in state.items()}
        report.exact("keys and shapes", shapes == case.config["keys"], name)
        report.exact("dtypes", all(str(t.dtype) == f"torch.{case.config['dtype']}" for t in state.values()), name)
        report.exact("values: all containers alike", _alike(state, first), name)
        source = _source(case)
        if source is not None:
            unwrapped = {key.removeprefix("module."): tensor for key, tensor in state.items()}  # of DataParallel
            report.exact("values: those of the case it was made of", _alike(unwrapped, source), name)
    evaluation = case.tolerances.get(f"model_{str(dtype).removeprefix('torch.')}", {})
    both = {**DEFAULTS[f"model_{str(dtype).removeprefix('torch.')}"], **evaluation}
    both["nll"] = (limits["nll"][0 if dtype == torch.float64 else 1],)
    configuration = configuration_of(first, case.config["constructor"])
    model = prepare(build(configuration.shape, configuration.n_token), configuration.tensors, dtype, both)
    memory = TRANSFORMER_MEMORY if isinstance(model, DEQTransformerLM) else TRELLIS_MEMORY
    Reading(model, case, dtype, both, report, memory).evaluate("", file="expected")


def configuration_of(state: dict[str, Tensor], constructor: dict[str, Any]) -> Configuration:
    """What a checkpoint is; the constructor's arguments say what no tensor tells."""
    known = {field.name for field in fields(OriginalOptions)}
    named = {"kernel_size": "ksize", "ninp": "d_embed"}
    given = {named.get(key, key): value for key, value in constructor.items() if value is not None}
    options: dict[str, Any] = {
        key: tuple(value) if key == "cutoffs" else value for key, value in given.items() if key in known
    }
    return configure(translate(state), OriginalOptions(**options))


def _source(case: Case) -> dict[str, Tensor] | None:
    """The parameters of the recorded case that was saved, if it lies beside this one, rounded as they were."""
    folder = case.folder.parent / str(case.config.get("from_case"))
    if not (folder / "state.safetensors").is_file():
        return None
    source = Case(folder, None, case.tolerances)
    stored = source.tensors("state")
    keys = source.config["state_dict_keys"]
    dtype = getattr(torch, case.config["dtype"])
    # Copies under weight norm are computed anew from the rounded parameters.
    return {key: stored[name].to(dtype) for key, name in keys.items() if "func_copy." not in name}


def _alike(state: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Bit for bit, as far as both have the key; a checkpoint lacks what was no part of the model."""
    shared = state.keys() & other.keys()
    return bool(shared) and all(torch.equal(state[key], other[key]) for key in shared)
