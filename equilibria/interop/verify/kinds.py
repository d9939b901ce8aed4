"""Which kind a case is, by its name, and what checks it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from equilibria.interop.verify import (
    checkpoints,
    dropouts,
    embeddings,
    jacobian,
    layers,
    optimizers,
    positions,
    softmaxes,
    solvers,
    texts,
    transformer,
    trellis,
    trellis_layer,
    weight_norms,
)
from equilibria.interop.verify.cases import Case
from equilibria.interop.verify.report import Report
from equilibria.interop.verify.tolerances import Limits

Checker = Callable[[Case, torch.dtype, Limits, Report], None]

MODEL = {torch.float64: "model_float64", torch.float32: "model_float32"}
COMPONENT = {torch.float64: "component_float64", torch.float32: "component_float32"}


def only(group: str) -> dict[torch.dtype, str]:
    """For what is recorded in double alone."""
    return {torch.float64: group}


@dataclass(frozen=True)
class Kind:
    check: Checker
    groups: dict[torch.dtype, str]
    """The tolerances of each precision in which it is checked."""


KINDS = {
    "transformer": Kind(transformer.check_2019, MODEL),
    "deq2021_transformer": Kind(transformer.check_2021, MODEL),
    "trellis": Kind(trellis.check, MODEL),
    "component_adaptive_embedding": Kind(embeddings.check, COMPONENT),
    "component_adaptive_softmax": Kind(softmaxes.check_adaptive, COMPONENT),
    "component_split_softmax": Kind(softmaxes.check_split, COMPONENT),
    "component_mixture_of_softmaxes": Kind(softmaxes.check_mixture, COMPONENT),
    "component_positional_embedding": Kind(positions.check, COMPONENT),
    "component_transformer_layer": Kind(layers.check, COMPONENT),
    "component_trellis_layer": Kind(trellis_layer.check, COMPONENT),
    "component_weight_norm": Kind(weight_norms.check, COMPONENT),
    "component_dropouts": Kind(dropouts.check, COMPONENT),
    "component_broyden": Kind(solvers.check_2019, only("component_broyden")),
    "component_radam": Kind(optimizers.check_radam, dict.fromkeys(MODEL, "component_radam")),
    "component_lr_schedule": Kind(optimizers.check_schedule, only("component_lr_schedule")),
    "component_vocabulary_batching": Kind(texts.check, only("component_vocabulary_batching")),
    "deq2021_solvers_jacobian": Kind(jacobian.check, only("deq2021_solvers_jacobian")),
    "checkpoint": Kind(checkpoints.check, dict.fromkeys(MODEL, "checkpoint")),
}
"""By the beginning of a case's name; the longest that fits."""

NAMED = {
    "DEQTransformerLM (deq2019": "transformer",
    "DEQTransformerLM (deq2021": "deq2021_transformer",
    "DEQTrellisNetLM": "trellis",
}
"""The kinds of models by the beginning of what config.json calls them, for a case whose name does not tell."""


def kind_of(case: Case) -> Kind | None:
    """None for a kind that is not known."""
    fitting = [prefix for prefix in KINDS if case.name == prefix or case.name.startswith(f"{prefix}_")]
    if not fitting and case.has("state.safetensors"):  # a model and not a checkpoint of one
        model = str(case.config.get("model"))
        fitting = [kind for beginning, kind in NAMED.items() if model.startswith(beginning)]
    return KINDS[max(fitting, key=len)] if fitting else None


def demanded(case: Case, kind: Kind) -> dict[torch.dtype, str]:
    """The precisions in which a case is to be checked, with their tolerances: all of its kind, or those of the manifest."""
    if case.entry is None or "tolerances" not in case.entry:
        return kind.groups
    return {dtype: group for dtype, group in kind.groups.items() if group in case.entry["tolerances"]}
