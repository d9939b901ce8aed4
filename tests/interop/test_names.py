"""Every tensor of the original's state dicts and gradients has its name here, each exactly once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from equilibria.interop.original.names import family, first_names, release, translate

load_file = pytest.importorskip("safetensors.torch").load_file


def recorded(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration of a case, and its whole state dict, tied and repeated tensors included."""
    config = json.loads((folder / "config.json").read_text())
    stored = load_file(folder / "state.safetensors")
    state = {name: stored[first] for name, first in config["state_dict_keys"].items()}
    return config, state | {name: tensor for name, tensor in stored.items() if name.startswith("crit.tail")}


@pytest.fixture(scope="session")
def cases(shared_golden: Path) -> list[Path]:
    """All recorded models."""
    folders = [path.parent for path in sorted(shared_golden.glob("*/state.safetensors"))]
    assert len(folders) > 10
    return folders


def test_whole_state_dicts(cases: list[Path]) -> None:
    for folder in cases:
        config, state = recorded(folder)
        named = translate(state)
        expected = "trellisnet" if folder.name.startswith("trellis") else "transformer"
        assert family(state) == expected
        assert release(state) == ("2021" if "2021" in folder.name else "2019")
        assert all(name.startswith(("embedding.", "inject.", "deq.block.", "softmax.")) for name in named)
        # Every trainable tensor is there, and tied ones under both names.
        distinct = {tensor.data_ptr() for tensor in named.values()}
        trainable = {
            tensor.data_ptr() for name, tensor in state.items() if "func_copy" not in name and name != "pos_emb.inv_freq"
        }
        assert distinct == trainable, folder.name
        tied = config["constructor"]["tie_weights"]
        if expected == "transformer":
            assert (named["embedding.tables.0"].data_ptr() == named["softmax.weights.0"].data_ptr()) == tied


def test_gradients(cases: list[Path]) -> None:
    for folder in cases:
        for path in folder.glob("train*.safetensors"):
            tensors = load_file(path)
            gradients = {name.removeprefix("grad."): t for name, t in tensors.items() if name.startswith("grad.")}
            named = translate(gradients)
            assert len(named) == len(gradients) > 5
            assert named.keys() <= translate(recorded(folder)[1]).keys(), path


def test_weight_drop_changes_no_name(cases: list[Path]) -> None:
    folder = next(path for path in cases if path.name == "trellis_f_dropouts")
    config, state = recorded(folder)
    renamed = {}
    for name in config["checks"]["state_dict_keys_with_wdrop"]:
        renamed[name] = state[name.replace("trellisnet.module.", "trellisnet.").removesuffix("_raw")]
    assert len(renamed) == len(state)
    assert translate(renamed).keys() == translate(state).keys()


def transformer() -> dict[str, Tensor]:
    weight, bias = torch.randn(6, 2, 1), torch.randn(1, 2)
    return {
        "word_emb.emb_layers.0.weight": torch.randn(5, 2),
        "inject_conv.weight": torch.randn(6, 2, 1),
        "pos_emb.inv_freq": torch.ones(1, dtype=torch.float64),
        "func.dec_attn.qkv_net.weight": weight,
        "func.dec_attn.r_w_bias": bias,
        "deq.func.dec_attn.qkv_net.weight": weight.clone(),
        "func_copy.dec_attn.qkv_net.weight": weight,
        "deqback.func_copy.dec_attn.qkv_net.weight": weight,
        "deqback.func.dec_attn.r_w_bias": bias,
    }


def test_kernels_of_size_one_become_matrices() -> None:
    state = transformer()
    named = translate(state)
    assert sorted(named) == ["deq.block.content_bias", "deq.block.qkv.weight", "embedding.tables.0", "inject.weight"]
    assert torch.equal(named["deq.block.qkv.weight"], state["func.dec_attn.qkv_net.weight"][..., 0])
    assert named["deq.block.content_bias"] is state["func.dec_attn.r_w_bias"]


def test_rounded_frequencies_are_kept() -> None:
    exact = 10000.0 ** -(torch.arange(0, 6, 2, dtype=torch.float64) / 6)
    assert translate({"pos_emb.inv_freq": exact}) == {}
    for other in (exact.float(), exact * 1.0001, exact[None]):
        assert translate({"pos_emb.inv_freq": other})["deq.block.frequencies"] is other


def test_a_wrapped_model_has_the_same_names() -> None:
    state = transformer()
    wrapped = {f"module.{name}": tensor for name, tensor in state.items()}
    assert translate(wrapped).keys() == translate(state).keys()
    assert family(wrapped) == "transformer"


@pytest.mark.parametrize("order", ["first to last", "last to first"])
def test_repeats_must_agree(order: str) -> None:
    state = transformer()
    state["deq.func.dec_attn.qkv_net.weight"][3, 1, 0] += 1e-6
    items = list(state.items())
    with pytest.raises(ValueError, match=r"are one tensor in the original, but differ here") as error:
        first_names(dict(items if order == "first to last" else reversed(items)))
    assert "deq.func.dec_attn.qkv_net.weight" in str(error.value)
    state["deq.func.dec_attn.qkv_net.weight"] = torch.randn(6, 3, 1)
    with pytest.raises(ValueError, match="differ here"):
        first_names(state)


def test_repeats_that_are_not_a_number_agree() -> None:
    state = transformer()
    for name, tensor in state.items():
        if name.endswith("qkv_net.weight"):
            state[name] = torch.full_like(tensor, float("nan"))
    assert translate(state)["deq.block.qkv.weight"].isnan().all()


def test_a_repeat_alone_stands_for_the_first() -> None:
    state = {name: tensor for name, tensor in transformer().items() if not name.startswith("func.")}
    assert translate(state).keys() == translate(transformer()).keys()
    only_copies = {name: tensor for name, tensor in state.items() if "deq.func" not in name}
    assert "deq.block.qkv.weight" not in translate(only_copies)


@pytest.mark.parametrize("leaf", ["weight", "weight_v", "weight_raw", "weight_v_raw"])
def test_copies_are_as_old_as_the_last_forward_pass(leaf: str) -> None:
    state = {
        f"trellisnet.module.func.full_conv.{leaf}": torch.randn(8, 2, 2),
        "trellisnet.module.func_copy.full_conv.weight": torch.randn(8, 2, 2),
        "trellisnet.module.deqback.func_copy.full_conv.weight": torch.randn(8, 2, 2),
    }
    named = translate(state)
    (tensor,) = named.values()
    assert tensor is state[f"trellisnet.module.func.full_conv.{leaf}"]
    state["trellisnet.module.deqback.func_copy.full_conv.weight"] = torch.randn(8, 3, 2)
    with pytest.raises(ValueError, match=r"deqback.func_copy.full_conv.weight has shape \(8, 3, 2\), .* \(8, 2, 2\)"):
        translate(state)


def test_weight_norm_has_two_parameters() -> None:
    state = {
        "func.dec_attn.qkv_net.weight_g": torch.ones(6, 1, 1),
        "func.dec_attn.qkv_net.weight_v": torch.randn(6, 2, 1),
    }
    named = translate(state)
    assert sorted(named) == [f"deq.block.qkv.parametrizations.weight.original{i}" for i in (0, 1)]
    assert [tensor.shape for tensor in named.values()] == [(6, 1), (6, 2)]


def test_nothing_unknown_is_left_over() -> None:
    with pytest.raises(ValueError, match=r"no parameter func.dec_attn.extra.weight, a, b and 1 more"):
        translate(transformer() | {"func.dec_attn.extra.weight": torch.ones(1)} | dict.fromkeys("abc", torch.ones(1)))
    with pytest.raises(ValueError, match=r"neither a DEQ-Transformer nor a DEQ-TrellisNet .* its names are conv1.weight"):
        family({"conv1.weight": torch.ones(1)})
    with pytest.raises(ValueError, match="neither"):
        family({})
