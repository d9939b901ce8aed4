"""Combinations of options that no recording has, against the models written out plainly: losses and all gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from plain import Plain, transformer, trellisnet
from torch import Tensor

from equilibria import Implicit, Stopping
from equilibria.interop.original.names import translate
from equilibria.interop.verify import transformer as verify_transformer
from equilibria.interop.verify import trellis as verify_trellis
from equilibria.interop.verify.draws import masks
from equilibria.models.block import Memory
from equilibria.models.deq_transformer import DEQTransformerLM
from equilibria.models.deq_trellisnet import DEQTrellisNetLM, TrellisMemory

TIGHT = Stopping(rtol=1e-13, atol=0.0, max_evals=300)
TRANSFORMER = {
    "n_token": 40, "n_head": 3, "d_model": 12, "d_head": 4, "d_inner": 14, "tie_weights": True, "d_embed": None,
    "div_val": 1, "tie_projs": [False], "pre_lnorm": False, "wnorm": False, "mem_len": 6, "local_size": 0, "cutoffs": [],
}  # fmt: skip
TRELLISNET = {
    "n_token": 40, "ninp": 7, "nhid": 5, "nout": 7, "kernel_size": 2, "dilation": 1, "wnorm": False, "tie_weights": True,
    "n_experts": 0,
}  # fmt: skip


def tensors(*shapes: tuple[int, ...]) -> list[Tensor]:
    torch.manual_seed(3)  # the maps drawn after it contract
    return [torch.randn(*shape, dtype=torch.float64) for shape in shapes]


def check(model: Any, out: Any, plain: Plain, nll: Tensor) -> None:
    """Loss of each token, and gradients of all parameters by our names."""
    torch.testing.assert_close(out.nll, nll, rtol=0, atol=1e-10)
    assert all(solve.converged.all() for solve in out.stats)
    gradients = torch.autograd.grad(nll.mean(), list(plain.parameters.values()))
    expected = translate(dict(zip(plain.parameters, gradients, strict=True)))
    parameters = dict(model.named_parameters())
    assert expected.keys() == parameters.keys()
    ours = torch.autograd.grad(out.nll.mean(), list(parameters.values()))
    for name, gradient in zip(parameters, ours, strict=True):
        error = (gradient - expected[name]).norm() / expected[name].norm().clamp_min(1e-12)  # one expert: nothing to learn
        assert error < 1e-9, f"{name}: {error:.1e}"


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize(
    "options",
    [
        {"pre_lnorm": True, "wnorm": True, "local_size": 4},
        {"cutoffs": [10, 25], "tie_projs": [True, False, True]},  # one table, nothing to project
        {"cutoffs": [10, 25], "tie_projs": [True, False, True], "d_embed": 8, "wnorm": True},
        {"cutoffs": [10, 25], "div_val": 2, "tie_projs": [True, False, True], "tie_weights": False, "pre_lnorm": True},
        {"cutoffs": [10], "div_val": 2, "d_embed": 20, "tie_projs": [False, True], "local_size": 20},
        {"d_embed": 8, "tie_projs": [True], "tie_weights": False, "n_head": 1, "d_head": 12},
    ],
    ids=str,
)
def test_transformer(options, p):
    plain = Plain(TRANSFORMER | options)
    (past_z, past_u) = tensors((2, 12, 6), (2, 36, 6))
    tokens, targets = torch.randint(40, (2, 2, 9))
    nll, _ = transformer(plain, tokens, targets, past_z, past_u, p)
    config = verify_transformer.config_of(plain.options)
    model = DEQTransformerLM(config, stopping=TIGHT, adjoint=Implicit(stopping=TIGHT)).double()
    model.load_state_dict(translate(plain.state()))
    with verify_transformer.recorded_draws(model, plain.masks):
        out = model(tokens, targets, Memory(past_z.mT, past_u.mT))
    check(model, out, plain, nll)


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("wnorm", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "dilation": 2},
        {"kernel_size": 1},
        {"tie_weights": False, "ninp": 5, "kernel_size": 2, "dilation": 12},  # reaches behind the memory
        {"splits": [6, 15, 30]},
        {"splits": [20], "tie_weights": False},
        {"n_experts": 3, "ninp": 4, "kernel_size": 3},
        {"n_experts": 1, "tie_weights": False},
    ],
    ids=str,
)
def test_trellisnet(options, wnorm, p):
    splits = options.get("splits", [])
    plain = Plain(TRELLISNET | options | {"wnorm": wnorm}, splits=splits)
    h = plain.options["nhid"] + plain.options["nout"]
    (past,) = tensors((2, 2 * h, 1))
    tokens, targets = torch.randint(39, (2, 2, 9))
    nll, _ = trellisnet(plain, tokens, targets, past, p)
    dropouts = dict.fromkeys(verify_trellis.DROPOUTS, p) | ({} if plain.options["n_experts"] else {"dropoutl": 0.0})
    config = verify_trellis.config_of(plain.options, splits, dropouts)
    model = DEQTrellisNetLM(config, stopping=TIGHT, adjoint=Implicit(stopping=TIGHT)).double()
    model.load_state_dict(translate(plain.state()))
    with masks(verify_trellis.places(model, plain.masks)):
        out = model(tokens, targets, TrellisMemory(past.mT))
    check(model, out, plain, nll)
