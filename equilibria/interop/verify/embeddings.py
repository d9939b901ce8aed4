"""The adaptive embedding: vectors, and gradients of tables and projections."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from equilibria.interop.verify.cases import Case
from equilibria.interop.verify.report import Report
from equilibria.interop.verify.tolerances import Limits
from equilibria.nn.adaptive_embedding import AdaptiveEmbedding

NAMES = {"emb_layers.": "tables.", "emb_projs.": "projections."}


def check(case: Case, dtype: torch.dtype, limits: Limits, report: Report) -> None:
    recorded = case.tensors("tensors", dtype)
    (limit,) = limits["all tensors"]
    for name, options in case.config["variants"].items():
        tensors = recorded.under(f"{name}/")
        embedding = AdaptiveEmbedding(
            options["n_token"], options["d_embed"], options["d_proj"], options["cutoffs"], options["div_val"]
        ).to(dtype)
        embedding.load_state_dict(renamed(tensors.under("param."), NAMES))
        out = embedding(tensors["ids"])
        report.relative("out", out, tensors["out"], limit, name)
        theirs = renamed(tensors.under("grad."), NAMES)
        parameters = dict(embedding.named_parameters())
        report.exact("grad: parameters", theirs.keys() <= parameters.keys(), name)
        ours = torch.autograd.grad(out, list(parameters.values()), tensors["upstream"], materialize_grads=True)
        for key, gradient in zip(parameters, ours, strict=True):
            # The original gives no gradient to a cluster without a word: what is not recorded is zero.
            report.relative("grad", gradient, theirs.get(key, torch.zeros_like(gradient)), limit, f"{name}: {key}")


def renamed(tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """By our names: the original's wraps each table of an embedding into a layer."""
    found: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        for theirs, ours in names.items():
            if key.startswith(theirs):
                key = ours + key.removeprefix(theirs).removesuffix(".weight")
        found[key] = tensor
    return found
