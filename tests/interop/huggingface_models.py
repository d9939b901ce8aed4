"""Small models for Transformers whose solves are exact, so that two ways to the same number give the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from equilibria.interop.huggingface.configuration import CONFIGS
from equilibria.interop.huggingface.modeling import MODELS, EquilibriumForCausalLM

V = 23
SHAPES: dict[str, dict[str, Any]] = {
    "transformer": {"d_model": 16, "n_head": 2, "d_inner": 12, "mem_len": 5},
    "trellisnet": {"d_embed": 6, "d_hidden": 5, "d_output": 6, "embed_range": 1.0},
}
EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 0.0, "max_evals": 200, "backward_rtol": 1e-12, "backward_max_evals": 200}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("transformer", {}),
    ("transformer", {"mem_len": 0, "d_embed": 8, "cutoffs": [6, 12], "div_val": 2}),
    ("transformer", {"depth": 3, "weight_norm": True}),
    ("trellisnet", {"kernel_size": 3, "dilation": 2}),
    ("trellisnet", {"n_experts": 2, "weight_norm": True}),
]
"""What changes the code that is run: a window, clusters, an explicit stack, a convolution that reaches back, a mixture."""


def make(family: str = "transformer", **options: Any) -> EquilibriumForCausalLM:
    torch.manual_seed(0)
    model = MODELS[family](CONFIGS[family](vocab_size=V, **{**SHAPES[family], **EXACT, **options})).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for name, parameter in model.named_parameters():
            if "inject" in name:  # or all texts would go on in the same way
                parameter.mul_(6)
    return model


def text(batch: int = 3, length: int = 9, seed: int = 1) -> Tensor:
    return torch.randint(V, (batch, length), generator=torch.Generator().manual_seed(seed))


def left_padded(tokens: Tensor, lengths: tuple[int, ...], filling: int = V - 1) -> tuple[Tensor, Tensor]:
    """The last `lengths` tokens of each row behind padding, and the mask that says so."""
    columns = torch.arange(tokens.shape[1])
    mask = columns >= tokens.shape[1] - torch.tensor(lengths)[:, None]
    return tokens.where(mask, torch.tensor(filling)), mask.long()
