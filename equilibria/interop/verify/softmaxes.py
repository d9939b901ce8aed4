"""Softmaxes over large vocabularies: adaptive, split, and mixtures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from equilibria.interop.verify.cases import Case
from equilibria.interop.verify.report import Report
from equilibria.interop.verify.tolerances import Limits
from equilibria.nn.adaptive_softmax import AdaptiveSoftmax
from equilibria.nn.mixture_of_softmaxes import MixtureOfSoftmaxes


def check_adaptive(case: Case, dtype: torch.dtype, limits: Limits, report: Report) -> None:
    recorded = case.tensors("tensors", dtype)
    (limit,) = limits["all tensors"]
    for name, options in case.config["variants"].items():
        tensors = recorded.under(f"{name}/")
        softmax = AdaptiveSoftmax(
            options["n_token"], options["d_embed"], options["d_proj"], options["cutoffs"], options["div_val"]
        ).to(dtype)
        softmax.load_state_dict(_adaptive_names(tensors.under("param.")))
        hidden, target = tensors["hidden"].clone().requires_grad_(), tensors["target"]
        nll = softmax(hidden, target)
        report.relative("nll_in_order", nll, tensors["nll_in_order"], limit, name)
        by_cluster = nll.flatten()[softmax.cluster_order(target)]
        report.relative("nll_cluster_order", by_cluster, tensors["nll_cluster_order"], limit, name)
        of_all = -softmax.log_prob(hidden[: len(tensors["all_nll"])])
        report.relative("all_nll", of_all, tensors["all_nll"], limit, name)
        theirs = _adaptive_names(tensors.under("grad."))
        _gradients(nll, tensors["upstream"], {"hidden": hidden}, softmax, theirs, limit, report, name)


def check_split(case: Case, dtype: torch.dtype, limits: Limits, report: Report) -> None:
    recorded = case.tensors("tensors", dtype)
    (limit,) = limits["all tensors"]
    names = {
        "weight": "weights.0",
        "bias": "biases.0",
        "tail_vectors": "cluster_weight",
        "tail_bias": "cluster_bias",
        "hidden": "hidden",
    }
    for name, options in case.config["variants"].items():
        tensors = recorded.under(f"{name}/")
        width = options["hidden_size"]
        softmax = AdaptiveSoftmax(options["n_token"], width, width, options["splits"]).to(dtype)
        words = {names[key]: tensors[key] for key in ("weight", "bias")}
        softmax.load_state_dict(words | {names[key]: value for key, value in tensors.under("param.").items()})
        hidden = tensors["hidden"].clone().requires_grad_()
        loss = softmax(hidden, tensors["target"]).mean()
        report.relative("loss", loss, tensors["loss"], limit, name)
        if "all_logprob" in tensors:
            of_all = softmax.log_prob(hidden[: len(tensors["all_logprob"])])
            report.relative("all_logprob", of_all, tensors["all_logprob"], limit, name)
        theirs = {names[key]: value for key, value in tensors.under("grad.").items()}
        _gradients(loss, torch.ones_like(loss), {"hidden": hidden}, softmax, theirs, limit, report, name)


def check_mixture(case: Case, dtype: torch.dtype, limits: Limits, report: Report) -> None:
    recorded = case.tensors("tensors", dtype)
    (limit,) = limits["all tensors"]
    names = {"decoder.weight": "weight", "decoder.bias": "bias"}
    parameters = {names.get(key, key): tensor for key, tensor in recorded.under("param.").items()}
    context = recorded["context"].clone().requires_grad_()
    options: dict[str, Any] = {"n_experts": case.config["n_experts"], "d_embed": case.config["ninp"]}
    mixture = MixtureOfSoftmaxes(len(parameters["bias"]), context.shape[-1], **options).to(dtype)
    mixture.load_state_dict(parameters)
    log_prob = mixture.log_prob(context)
    report.relative("log_prob", log_prob, recorded["log_prob"], limit)
    prob = log_prob.double().exp() - mixture.eps
    report.relative("prob", prob, recorded["prob"], limit)
    # The loss that training takes is another path to the same numbers.
    words = torch.arange(log_prob.shape[-1]).expand_as(log_prob)
    every = torch.stack([mixture(context, words[..., word]) for word in range(log_prob.shape[-1])], dim=-1)
    report.relative("nll of every word", -every, recorded["log_prob"], limit)
    theirs = {names.get(key, key): tensor for key, tensor in recorded.under("grad.").items()}
    _gradients(log_prob, recorded["upstream"], {"context": context}, mixture, theirs, limit, report, "")


def _gradients(
    output: Tensor,
    upstream: Tensor,
    inputs: Mapping[str, Tensor],
    module: nn.Module,
    theirs: Mapping[str, Tensor],
    limit: float,
    report: Report,
    name: str,
) -> None:
    leaves = {**inputs, **dict(module.named_parameters())}
    report.exact("grad: parameters", theirs.keys() <= leaves.keys(), name)
    ours = torch.autograd.grad(output, list(leaves.values()), upstream, materialize_grads=True)
    for key, gradient in zip(leaves, ours, strict=True):
        # The original gives no gradient to a cluster without a target: what is not recorded is zero.
        their = theirs.get(key, torch.zeros_like(gradient))
        report.relative("grad", gradient, their, limit, f"{name}: {key}" if name else key)


def _adaptive_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """out_layers.I.weight -> weights.I, out_layers.I.bias -> biases.I, out_projs.I -> projections.I."""
    found: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        layer = key.split(".")
        if layer[0] == "out_layers":
            found[f"{'weights' if layer[2] == 'weight' else 'biases'}.{layer[1]}"] = tensor
        elif layer[0] == "out_projs":
            found[f"projections.{layer[1]}"] = tensor
        else:
            found[key] = tensor
    return found
