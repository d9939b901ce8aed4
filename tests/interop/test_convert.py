"""What the tensors of a checkpoint tell of its model, and that a model made from them computes what the original did."""

from __future__ import annotations

import doctest
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from equilibria import Broyden, Stopping
from equilibria.interop.original import configuration, names
from equilibria.interop.original.checkpoint import read_checkpoint
from equilibria.interop.original.configuration import Configuration, build, configure
from equilibria.interop.original.names import Release, translate
from equilibria.interop.original.options import OriginalOptions
from equilibria.models.deq_transformer import TransformerShape
from equilibria.models.deq_trellisnet import TrellisShape
from equilibria.solution import UserError

load_file = pytest.importorskip("safetensors.torch").load_file

TRANSFORMER = ["tgt_len", "mem_len", "local_size", "pre_lnorm"]
CONTAINERS = ["zip", "legacy", "legacy_cuda"]


def constructor(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["constructor"]


def options(folder: Path) -> OriginalOptions:
    """What no tensor tells, as the recorded model had it."""
    their = constructor(folder)
    if "nhid" in their:
        splits = json.loads((folder / "config.json").read_text()).get("split_softmax_splits")
        return OriginalOptions(dilation=their["dilation"], cutoffs=tuple(splits) if splits else None)
    untold = their["cutoffs"] and their["div_val"] == 1
    given = {name: their[name] for name in TRANSFORMER}
    return OriginalOptions(**given, cutoffs=tuple(their["cutoffs"]) if untold else None)


def whole_state(folder: Path) -> dict[str, Tensor]:
    stored = load_file(folder / "state.safetensors")
    keys = json.loads((folder / "config.json").read_text())["state_dict_keys"]
    own = {name: tensor for name, tensor in stored.items() if name.startswith("crit.tail")}
    return {name: stored[first] for name, first in keys.items()} | own


def test_every_recorded_model_is_recognised(shared_golden: Path) -> None:
    folders = [path.parent for path in sorted(shared_golden.glob("*/state.safetensors"))]
    assert len(folders) > 10
    for folder in folders:
        their, found = constructor(folder), configure(translate(whole_state(folder)), options(folder))
        assert found.n_token == their["n_token"]
        shape = found.shape
        assert (shape.weight_norm, shape.tie_weights) == (their["wnorm"], their["tie_weights"]), folder.name
        if isinstance(shape, TransformerShape):
            assert (shape.d_model, shape.n_head, shape.d_inner) == (their["d_model"], their["n_head"], their["d_inner"])
            assert shape.d_embed == their["d_embed"]
            assert (list(shape.cutoffs), shape.div_val) == (their["cutoffs"], their["div_val"])
            assert (shape.mem_len, shape.pre_norm, found.length) == (their["mem_len"], their["pre_lnorm"], their["tgt_len"])
            assert shape.local_size == (their["local_size"] or 1000)
            if shape.tie_projections is not None:
                assert list(shape.tie_projections) == their["tie_projs"]
        else:
            assert (shape.d_embed, shape.d_hidden, shape.d_output) == (their["ninp"], their["nhid"], their["nout"])
            assert (shape.kernel_size, shape.dilation) == (their["kernel_size"], their["dilation"])
            assert shape.n_experts == their["n_experts"]


def converted(path: Path) -> Configuration:
    return configure(translate(read_checkpoint(path)), options(path.parent))


@torch.no_grad()
def losses(found: Configuration, expected: dict[str, Tensor], dtype: torch.dtype) -> list[Tensor]:
    """(L, B) per-token losses of the recorded segments, with carried memory."""
    model = build(found.shape, found.n_token).to(dtype).eval()
    model.load_state_dict(found.tensors)
    model.deq.solver = Broyden(history=150)
    rtol = 1e-12 if dtype == torch.float64 else 1e-6
    model.deq.eval_stopping = Stopping(rtol=rtol, atol=0.0, max_evals=250)
    memory, found_losses = None, []
    for segment in range(3):
        nll, memory, *_ = model(expected[f"data.{segment}"].T, expected[f"target.{segment}"].T, memory)
        found_losses.append(nll.T)
    return found_losses


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_the_recorded_losses(shared_golden: Path, container: str, dtype: torch.dtype) -> None:
    tolerance = 1e-8 if dtype == torch.float64 else 5e-4
    for folder in sorted(shared_golden.glob("checkpoint_*")):
        expected = load_file(folder / "expected.safetensors")
        for segment, nll in enumerate(losses(converted(folder / f"{container}.pkl"), expected, dtype)):
            assert (nll - expected[f"nll.{segment}"]).abs().max() < tolerance, folder.name


def transformer(**changes: Any) -> dict[str, Tensor]:
    """The state dict of a small model, by our names."""
    torch.manual_seed(0)
    shape = TransformerShape(**{"d_model": 8, "n_head": 2, "d_inner": 6, **changes})
    return build(shape, 20).state_dict()


def trellisnet(**changes: Any) -> dict[str, Tensor]:
    torch.manual_seed(0)
    shape = TrellisShape(**{"d_embed": 4, "d_hidden": 3, "d_output": 4, **changes})
    return build(shape, 20).state_dict()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_weights": False},
        {"weight_norm": True},
        {"d_embed": 6},
        {"cutoffs": (5, 12), "div_val": 2},
        {"cutoffs": (5, 12), "div_val": 2, "d_embed": 6, "tie_weights": False, "tie_projections": (True, False, True)},
        {"cutoffs": (5,), "div_val": 3},
        {"div_val": 2},
    ],
)
def test_every_shape_of_transformer(changes: dict[str, Any]) -> None:
    named = transformer(**changes)
    found = configure(named, OriginalOptions())
    assert isinstance(found.shape, TransformerShape)
    built = build(found.shape, found.n_token)
    built.load_state_dict(named)
    for name in ("d_model", "n_head", "d_inner", "d_embed", "cutoffs", "weight_norm", "tie_weights"):
        default = TransformerShape(d_model=8, n_head=2, d_inner=6)
        assert getattr(found.shape, name) == changes.get(name, getattr(default, name)), name
    fresh = build(TransformerShape(**{"d_model": 8, "n_head": 2, "d_inner": 6, **changes}), 20)
    assert len(list(built.parameters())) == len(list(fresh.parameters()))  # the same are tied


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_weights": False},
        {"tie_weights": False, "d_embed": 5},
        {"weight_norm": True, "kernel_size": 3},
        {"n_experts": 3},
        {"n_experts": 2, "d_output": 3},
        {"kernel_size": 1},
    ],
)
def test_every_shape_of_trellisnet(changes: dict[str, Any]) -> None:
    named = trellisnet(**changes)
    found = configure(named, OriginalOptions())
    assert isinstance(found.shape, TrellisShape)
    for name in ("d_embed", "d_hidden", "d_output", "kernel_size", "n_experts", "weight_norm", "tie_weights"):
        default = TrellisShape(d_embed=4, d_hidden=3, d_output=4)
        assert getattr(found.shape, name) == changes.get(name, getattr(default, name)), name


def test_clusters_that_are_not_saved_start_at_zero() -> None:
    named = trellisnet()
    assert configure(named, OriginalOptions()).shape.cutoffs == ()
    found = configure(named, OriginalOptions(cutoffs=(5, 12)))
    assert found.shape.cutoffs == (5, 12)
    assert torch.equal(found.tensors["softmax.cluster_weight"], torch.zeros(2, 4))
    assert torch.equal(found.tensors["softmax.cluster_bias"], torch.zeros(2))


def test_what_is_given_is_not_assumed() -> None:
    named = transformer()
    usual = configure(named, OriginalOptions())
    assert usual.assumed == {
        "mem_len": 150, "local_size": 0, "pre_lnorm": False, "dropout": 0.0, "subseq_len": 0, "tgt_len": 150
    }  # fmt: skip
    given = OriginalOptions(mem_len=3, local_size=0, pre_lnorm=True, dropout=0.1, subseq_len=4, tgt_len=9, d_model=8)
    found = configure(named, given)
    assert found.assumed == {}
    assert found.length == 9
    assert isinstance(found.shape, TransformerShape)
    assert (found.shape.mem_len, found.shape.pre_norm, found.shape.dropout, found.shape.subseq_len) == (3, True, 0.1, 4)


@pytest.mark.parametrize(
    ("release", "as_released", "rate"), [("2019", True, 0), ("2019", False, 0.25), ("2021", True, 0.25)]
)
def test_attention_is_dropped_since_2021(release: Release, as_released: bool, rate: float) -> None:
    shape = configure(transformer(), OriginalOptions(dropatt=0.25), release=release, as_released=as_released).shape
    assert isinstance(shape, TransformerShape)
    assert shape.attention_dropout == rate


def test_slips_are_kept_or_not() -> None:
    for kept in (True, False):
        shape = configure(transformer(), OriginalOptions(), as_released=kept).shape
        assert isinstance(shape, TransformerShape)
        assert shape.drop_positions == kept
        shape = configure(trellisnet(), OriginalOptions(), as_released=kept).shape
        assert isinstance(shape, TrellisShape)
        assert shape.freeze_last_row == kept


@pytest.mark.parametrize(
    ("changes", "given", "said"),
    [
        ({}, {"n_head": 4}, "--n-head is 4, but the tensors say 2"),
        ({}, {"d_embed": 4}, "--d-embed is 4, but the tensors say 8"),
        ({"cutoffs": (5, 12), "div_val": 2}, {"cutoffs": (5, 13)}, "--cutoffs is 5 13, but the tensors say 5 12"),
        ({"cutoffs": (5, 12), "div_val": 2}, {"div_val": 4}, "--div-val is 4, but the tensors say 2"),
        ({"cutoffs": (5, 12)}, {}, "no tensor tells where they begin, but crit.cluster_weight has 2 clusters"),
        ({"cutoffs": (5, 12)}, {"cutoffs": (5,)}, "--cutoffs is 5, but crit.cluster_weight has 2 clusters"),
        ({"cutoffs": (5, 12)}, {"cutoffs": (5, 20)}, "--cutoffs is 5 20, but the tensors have 20 words"),
        ({}, {"cutoffs": (5,)}, "--cutoffs is 5, but crit.cluster_weight has 0 clusters"),
        ({}, {"nhid": 4}, "--nhid is an option of a DEQ-TrellisNet, but the tensors are those of a DEQ-Transformer"),
        ({}, {"n_experts": 0}, "--n-experts is an option of a DEQ-TrellisNet"),
        ({}, {"mem_len": -1}, "--mem-len is -1; give 0 or more"),
        ({}, {"tgt_len": 0}, "--tgt-len is 0; give 1 or more"),
        ({}, {"dropout": 1.0}, "--dropout is 1.0; give a share"),
    ],
)
def test_contradictions_name_both_sides(changes: dict[str, Any], given: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        configure(transformer(**changes), OriginalOptions(**given))
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"mem_len": 10}, "--mem-len is an option of a DEQ-Transformer"),
        ({"nhid": 5}, "--nhid is 5, but the tensors say 3"),
        ({"n_experts": 3}, "--n-experts is 3, but the tensors say 0"),
        ({"cutoffs": (5, 5)}, "--cutoffs is 5 5, but the tensors have 20 words"),
        ({"dilation": 0}, "--dilation is 0"),
        ({"dropoutl": 0.5}, "--dropoutl is 0.5, but"),
    ],
)
def test_contradictions_of_trellisnet(given: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        configure(trellisnet(), OriginalOptions(**given))
    assert said in str(error.value)


@pytest.mark.parametrize("make", [transformer, trellisnet])
@pytest.mark.parametrize("change", ["missing", "more rows", "more columns", "more dimensions", "fewer dimensions"])
def test_any_tensor_that_does_not_fit(make: Any, change: str) -> None:
    """Every tensor in turn; tied ones together, as they are in a file."""
    changed = {
        "more rows": lambda t: torch.cat((t, t)),
        "more columns": lambda t: torch.cat((t, t), -1),
        "more dimensions": lambda t: t[None],
        "fewer dimensions": lambda t: t[0],
    }
    for shape in ({}, {"weight_norm": True}, {"tie_weights": False}):
        whole = make(**shape)
        for name in whole:
            named = dict(whole)
            if change == "missing":
                del named[name]
            else:
                named[name] = changed[change](whole[name])
            with pytest.raises(UserError) as error:
                configure(named, OriginalOptions())
            assert "\n" not in str(error.value)
            assert "deq.block" not in str(error.value)  # it speaks of the original's names


def test_some_tables_tied() -> None:
    named = transformer(cutoffs=(5, 12), div_val=2)
    named["softmax.weights.1"] = named["softmax.weights.1"] + 1
    with pytest.raises(UserError, match=r"out_layers\.0\.weight is word_emb.emb_layers.0.weight, but crit.out_layers.1"):
        configure(named, OriginalOptions())


@pytest.mark.parametrize("module", [names, configuration])
def test_examples_run(module: ModuleType) -> None:
    result = doctest.testmod(module, report=True)
    assert result.attempted > 2
    assert result.failed == 0


def test_something_else_beside_a_model() -> None:
    with pytest.raises(UserError, match=r"softmax.prior.weight does not belong to it|mixsoft.prior.weight does not"):
        configure(transformer() | {"softmax.prior.weight": torch.ones(2, 8)}, OriginalOptions())
