"""The model computes the function, and the gradients, of the released code of Bai, Kolter & Koltun 2019.

The recordings are float64: segments with carried memory, whole and in subsequences, the explicit stack, and gradients.
Those with a vocabulary in clusters or another embedding width are of models that are not built here.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from equilibria import Broyden, Implicit, Stopping
from equilibria.models.block import Memory
from equilibria.models.deq_transformer import DEQTransformerLM, TransformerConfig

load_file = pytest.importorskip("safetensors.torch").load_file

CASES = ["a_plain", "c_pre_lnorm", "d_wnorm", "f_local_longmem", "h_noncontractive"]
TIGHT = Stopping(rtol=1e-12, atol=0.0, max_evals=250)

NAMES = {
    "word_emb.emb_layers.0.weight": "embedding.tables.0",
    "inject_conv": "inject",
    "crit.out_layers.0.bias": "softmax.biases.0",
    "func.dec_attn.qkv_net": "deq.block.qkv",
    "func.dec_attn.r_net": "deq.block.position",
    "func.dec_attn.o_net": "deq.block.attention_out",
    "func.dec_attn.r_w_bias": "deq.block.content_bias",
    "func.dec_attn.r_r_bias": "deq.block.position_bias",
    "func.pos_ff.ff1_net": "deq.block.ff_in",
    "func.pos_ff.ff2_net": "deq.block.ff_out",
    "weight_g": "parametrizations.weight.original0",
    "weight_v": "parametrizations.weight.original1",
}


class Case(NamedTuple):
    model: DEQTransformerLM
    config: dict[str, Any]
    folder: Path

    def load(self, name: str) -> dict[str, Tensor]:
        return load_file(self.folder / f"{name}.safetensors")

    def names(self, tensors: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
        """Under our names, and without the trailing 1 of a convolution's weight."""
        renamed = {}
        for key, tensor in tensors.items():
            if not key.startswith(prefix) or key == "pos_emb.inv_freq" or key.startswith("func_copy"):
                continue
            name = key.removeprefix(prefix)
            for theirs, ours in NAMES.items():
                name = name.replace(theirs, ours)
            renamed[name] = tensor.squeeze(-1) if tensor.dim() == 3 else tensor
        return renamed


@pytest.fixture(params=CASES)
def case(request, shared_golden) -> Case:
    folder = shared_golden / f"transformer_{request.param}"
    config = json.loads((folder / "config.json").read_text())
    their = config["constructor"]
    ours = TransformerConfig(
        vocab_size=their["n_token"],
        d_model=their["d_model"],
        n_head=their["n_head"],
        d_inner=their["d_inner"],
        mem_len=their["mem_len"],
        pre_norm=their["pre_lnorm"],
        weight_norm=their["wnorm"],
        local_size=their["local_size"] or None,
    )
    adjoint = Implicit(stopping=TIGHT)
    model = DEQTransformerLM(ours, solver=Broyden(history=250), stopping=TIGHT, adjoint=adjoint).double()
    made = Case(model, config, folder)
    missing, unknown = model.load_state_dict(made.names(made.load("state")), strict=False)
    assert missing == ["softmax.weights.0"], missing  # tied
    assert not unknown
    return made


def with_options(model: DEQTransformerLM, **options: int) -> DEQTransformerLM:
    model.config = replace(model.config, **options)
    return model


def memory_of(tensors: dict[str, Tensor], kind: str, segment: int) -> Memory:
    u = tensors[f"full.mem_u0.{segment}"]  # the same however the segment was solved
    return Memory(tensors[f"{kind}.mem_z0.{segment}"].transpose(0, 1), u.transpose(0, 1))


def relative(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return ((ours - theirs).norm() / theirs.norm()).item()


def test_recorded_equilibrium_is_a_fixed_point(case):
    recorded = case.load("eval")
    model = case.model
    past = None
    for segment in range(case.config["n_segments"]):
        z = recorded[f"full.zstar.{segment}"].transpose(1, 2)
        u = model.injection(recorded[f"data.{segment}"].T)
        args = model.block.prepare(u, past, None, model.config.local_size)
        assert relative(model.block(z, *args), z) < 1e-11
        past = memory_of(recorded, "full", segment)


@pytest.mark.parametrize("kind", ["full", "sub", "stacked_eval_n_layer"])
@torch.no_grad()
def test_losses_and_memories_of_segments_in_a_row(case, kind):
    recorded = case.load("eval")
    model = case.model.eval()
    if kind == "sub":
        model = with_options(model, subseq_len=case.config["sub_subseq_len"])
    depth = case.config["constructor"]["eval_n_layer"] if kind == "stacked_eval_n_layer" else None
    memory = None
    for segment in range(case.config["n_segments"]):
        tokens, targets = recorded[f"data.{segment}"].T, recorded[f"target.{segment}"].T
        nll, memory, *_ = model(tokens, targets, memory, depth=depth)
        tolerance = 1e-8 if depth is None else 1e-10
        assert (nll - recorded[f"{kind}.nll.{segment}"].T).abs().max() < tolerance
        expected = memory_of(recorded, kind, segment)
        assert relative(memory.z, expected.z) < 1e-9
        assert relative(memory.u, expected.u) < 1e-9


@pytest.mark.parametrize("kind", ["train_full", "train_sub", "pretrain"])
def test_training_loss_and_gradients(case, kind):
    evaluation, recorded = case.load("eval"), case.load(kind)
    model = case.model
    if kind == "train_sub":
        model = with_options(model, subseq_len=case.config["sub_subseq_len"])
    segment = case.config["train_segment"]
    depth = case.config["constructor"]["n_layer"] if kind == "pretrain" else None
    tokens, targets = evaluation[f"data.{segment}"].T, evaluation[f"target.{segment}"].T
    loss = model(tokens, targets, memory_of(evaluation, "full", segment - 1), depth=depth).nll.mean()
    assert abs(loss.item() - recorded["loss"].item()) < 1e-9
    loss.backward()
    expected = case.names(recorded, "grad.")
    assert expected.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert relative(parameter.grad, expected[name]) < (1e-10 if kind == "pretrain" else 1e-7), name
