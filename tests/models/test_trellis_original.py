"""The model computes the function, and the gradients, of the released code of Bai, Kolter & Koltun 2019.

Every recording of a TrellisNet is read: segments with carried memory, whole and in subsequences, the explicit stack, and
training with gradients, with and without dropout. Tolerances are those that the recordings demand.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from equilibria import Broyden, Implicit, Stopping
from equilibria.interop.original.names import translate
from equilibria.models.deq_trellisnet import DEQTrellisNetLM, TrellisConfig, TrellisMemory
from equilibria.nn import AdaptiveSoftmax, FrozenDropout

load_file = pytest.importorskip("safetensors.torch").load_file

F64, F32 = torch.float64, torch.float32
GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden"
FOLDERS = sorted(GOLDEN.glob("trellis_*"))
WITH_DROPOUT = [folder for folder in FOLDERS if (folder / "train_dropout.safetensors").exists()]
# Of z*, nll, loss, each gradient, all gradients together; stopping of the solves.
DEMANDED = {
    F64: (1e-9, 1e-8, 1e-9, 1e-7, 1e-8, Stopping(rtol=1e-12, atol=0.0, max_evals=250)),
    F32: (1e-4, 5e-4, 5e-5, 1e-3, 2e-4, Stopping(rtol=1e-6, atol=0.0, max_evals=150)),
}
STACKED = {F64: (1e-10, 1e-10), F32: (2e-4, 2e-4)}  # nll, each gradient, without a solver


class Case:
    """A recording, and the model of its weights."""

    def __init__(self, folder: Path, dtype: torch.dtype = F64, **dropouts: Any) -> None:
        self.folder, self.dtype = folder, dtype
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        their = self.config["constructor"]
        ours = TrellisConfig(
            vocab_size=their["n_token"],
            d_embed=their["ninp"],
            d_hidden=their["nhid"],
            d_output=their["nout"],
            kernel_size=their["kernel_size"],
            dilation=their["dilation"],
            weight_norm=their["wnorm"],
            tie_weights=their["tie_weights"],
            n_experts=their["n_experts"],
            cutoffs=tuple(self.config["split_softmax_splits"] or ()),
            **dropouts,
        )
        stopping = DEMANDED[dtype][-1]
        adjoint = Implicit(stopping=stopping)
        self.model = DEQTrellisNetLM(ours, solver=Broyden(history=250), stopping=stopping, adjoint=adjoint)
        stored = self.load("state")
        state = {key: stored[stored_as] for key, stored_as in self.config["state_dict_keys"].items()}
        state |= {key: tensor for key, tensor in stored.items() if key.startswith("crit.")}
        self.model.to(dtype).load_state_dict(translate(state))

    def load(self, name: str) -> dict[str, Tensor]:
        tensors = load_file(self.folder / f"{name}.safetensors")
        return {key: x.to(self.dtype) if x.is_floating_point() else x for key, x in tensors.items()}

    def with_options(self, **options: int) -> DEQTrellisNetLM:
        self.model.config = replace(self.model.config, **options)
        return self.model

    def check_gradients(self, recorded: dict[str, Tensor], each: float, together: float) -> None:
        gradients = {key.removeprefix("grad."): x for key, x in recorded.items() if key.startswith("grad.")}
        expected = translate(gradients)
        own = {name: parameter.grad for name, parameter in self.model.named_parameters()}
        assert own.keys() == expected.keys()
        squares = []
        for name, gradient in own.items():
            assert gradient is not None
            assert relative(gradient, expected[name]) < each, name
            squares.append((gradient - expected[name]).square().sum())
        norm = sum(float(x.square().sum()) for x in expected.values()) ** 0.5
        assert float(torch.stack(squares).sum().sqrt()) < together * norm


def relative(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return ((ours - theirs).norm() / theirs.norm()).item()


def test_recordings_are_found(shared_golden):
    assert len(FOLDERS) == len(list(shared_golden.glob("trellis_*"))) > 0
    assert WITH_DROPOUT


every_recording = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)


def states_of(model: DEQTrellisNetLM) -> list[Tensor]:
    """What the softmax will be given from now on, as whole states."""
    states: list[Tensor] = []
    output = model.output
    model.output = lambda z: states.append(z) or output(z)
    return states


@every_recording
@pytest.mark.parametrize(("kind", "dtype"), [(kind, F64) for kind in ("full", "sub", "stacked")] + [("full", F32)])
@torch.no_grad()
def test_losses_and_memories_of_segments_in_a_row(folder, kind, dtype):
    case = Case(folder, dtype)
    recorded = case.load("eval")
    model = case.model.eval()
    if kind == "sub":
        model = case.with_options(subseq_len=case.config["sub_subseq_len"])
    depth = case.config["constructor"]["n_layer"] if kind == "stacked" else None
    tolerance_z, tolerance_nll, tolerance_loss, *_ = DEMANDED[dtype]
    if depth is not None:
        tolerance_nll = STACKED[dtype][0]
    states = states_of(model)
    memory = None
    segments = sum(key.startswith("data.") for key in recorded)
    for segment in range(segments):
        tokens, targets = recorded[f"data.{segment}"].T, recorded[f"target.{segment}"].T
        nll, memory, stats, _ = model(tokens, targets, memory, depth=depth)
        assert (nll - recorded[f"{kind}.nll.{segment}"].T).abs().max() < tolerance_nll
        assert relative(memory.z, recorded[f"{kind}.mem.{segment}"].transpose(0, 1)) < tolerance_z
        assert all(solve.converged.all() for solve in stats)
        if f"{kind}.zstar.{segment}" in recorded:
            assert relative(states[-1], recorded[f"{kind}.zstar.{segment}"].transpose(1, 2)) < tolerance_z
        if f"{kind}.loss.{segment}" in recorded:
            assert abs(nll.mean() - recorded[f"{kind}.loss.{segment}"]) < tolerance_loss
    if kind == "full":
        check_output(model, states[0], recorded["full.output.0"].transpose(0, 1), tolerance_nll)


def check_output(model: DEQTrellisNetLM, z: Tensor, recorded: Tensor, tolerance: float) -> None:
    """What the released code returns beside the loss: logits, log-probabilities, or what a split softmax reads."""
    steps = z[:, : recorded.shape[1]]
    if isinstance(model.softmax, AdaptiveSoftmax) and model.config.cutoffs:
        ours = model.output(steps)
    else:
        ours = model.log_prob(steps)
        recorded = recorded if model.config.n_experts else recorded.log_softmax(-1)
    assert (ours - recorded).abs().max() < tolerance


@every_recording
@pytest.mark.parametrize(
    ("kind", "dtype"), [(kind, F64) for kind in ("train_full", "train_sub", "pretrain")] + [("train_full", F32)]
)
def test_training_loss_and_gradients(folder, kind, dtype):
    case = Case(folder, dtype)
    evaluation, recorded = case.load("eval"), case.load(kind)
    model = case.model
    if kind == "train_sub":
        model = case.with_options(subseq_len=case.config["sub_subseq_len"])
    depth = case.config["constructor"]["n_layer"] if kind == "pretrain" else None
    tolerance_z, tolerance_nll, tolerance_loss, each, together, _ = DEMANDED[dtype]
    if depth is not None:
        tolerance_nll, each = STACKED[dtype]
    tokens, targets = evaluation["data.1"].T, evaluation["target.1"].T
    memory = TrellisMemory(evaluation["full.mem.0"].transpose(0, 1))
    out = model(tokens, targets, memory, depth=depth)
    assert (out.nll - recorded["nll"].T).abs().max() < tolerance_nll
    assert abs(out.nll.mean() - recorded["loss"]) < tolerance_loss
    assert relative(out.memory.z, recorded["mem"].transpose(0, 1)) < tolerance_z
    out.nll.mean().backward()
    case.check_gradients(recorded, each, together)


@pytest.mark.parametrize("folder", WITH_DROPOUT, ids=lambda folder: folder.name)
def test_training_with_dropout(folder):
    """With the masks that were drawn there."""
    checks = json.loads((folder / "config.json").read_text())["checks"]["train_dropout"]
    case = Case(
        folder,
        word_dropout=checks["emb_dropout"],
        input_dropout=checks["dropouti"],
        hidden_dropout=checks["dropouth"],
        output_dropout=checks["dropout"],
        weight_dropout=checks["wdrop"],
    )
    evaluation, recorded = case.load("eval"), case.load("train_dropout")
    model = case.model
    put(recorded["mask.embedding_rows"], model.word_dropout.drop)
    put(recorded["mask.word_emb"], model.input_dropout)
    put(recorded["mask.conv_input"].transpose(1, 2), model.block.dropout)
    put(recorded["mask.output"], model.output_dropout)
    put(recorded["mask.wdrop.func.full_conv"], weight_dropout(model.block.conv))
    put(recorded["mask.wdrop.inject_conv"], weight_dropout(model.inject))
    states = states_of(model)
    memory = TrellisMemory(evaluation["full.mem.0"].transpose(0, 1))
    loss = model(evaluation["data.1"].T, evaluation["target.1"].T, memory).nll.mean()
    tolerance_z, _, tolerance_loss, each, together, _ = DEMANDED[F64]
    assert abs(loss - recorded["loss"]) < tolerance_loss
    assert relative(states[-1], recorded["zstar"].transpose(1, 2)) < tolerance_z
    loss.backward()
    case.check_gradients(recorded, each, together)


def weight_dropout(convolution: Any) -> FrozenDropout:
    """Where a convolution's weight is dropped: its direction, under weight norm."""
    if hasattr(convolution, "parametrizations"):
        return convolution.parametrizations.weight[0].drop.drop
    return convolution.weight_dropout.drop


def put(mask: Tensor, dropout: FrozenDropout) -> None:
    """Let the next draws be this mask."""
    dropout.mask = lambda like, shape=None: mask.expand_as(mask)
