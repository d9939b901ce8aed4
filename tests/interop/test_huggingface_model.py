"""Models through Transformers: the same numbers, saved and loaded whole, with the ties that they had."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_models import CASES, V, left_padded, make, text
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from equilibria.interop.huggingface.modeling import EquilibriumForCausalLM
from equilibria.models import next_token_log_prob
from equilibria.nn.relative_attention import sinusoidal_frequencies


def reload(model: EquilibriumForCausalLM, folder: Path, **options: Any) -> Any:
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, **options)


@pytest.mark.parametrize(("family", "options"), CASES)
@torch.no_grad()
def test_logits_are_our_log_probabilities_and_survive_a_round_trip(
    family: str, options: dict[str, Any], tmp_path: Path
) -> None:
    model, tokens = make(family, **options), text()
    expected = next_token_log_prob(model.lm, tokens)
    assert torch.equal(model(tokens).logits, expected)
    loaded = reload(model, tmp_path)
    assert not loaded.training
    assert loaded.dtype == torch.float64
    assert torch.equal(loaded(tokens).logits, expected)


TIED = [
    ("transformer", {}, 1),
    ("transformer", {"d_embed": 8, "cutoffs": [6, 12], "div_val": 2}, 5),
    ("transformer", {"d_embed": 8, "cutoffs": [6, 12], "tie_weights": False}, 2),
    ("transformer", {"tie_weights": False}, 0),
    ("trellisnet", {}, 1),
    ("trellisnet", {"n_experts": 2}, 1),
]


@pytest.mark.parametrize(("family", "options", "ties"), TIED)
def test_what_is_tied_is_saved_once_and_tied_again(family: str, options: dict[str, Any], ties: int, tmp_path: Path) -> None:
    model = make(family, **options)
    loaded = reload(model, tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix not in (".json", ".py")) == ["model.safetensors"]
    assert set(saved) == {name for name, _ in model.named_parameters()}
    for each in (model, loaded):
        every = dict(each.named_parameters(remove_duplicate=False))
        assert len(every) - len(saved) == ties
        assert all(every[name] is every[source] for name, source in each.get_expanded_tied_weights_keys().items())
    with torch.no_grad():
        for one, other in zip(model.parameters(), loaded.parameters(), strict=True):
            assert torch.equal(one, other)


def test_stored_frequencies_stay_exact_in_low_precision(tmp_path: Path) -> None:
    model = make(stored_frequencies=True).float()
    loaded = reload(model, tmp_path, dtype=torch.bfloat16, device_map="cpu")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert torch.equal(loaded.lm.block.frequencies, sinusoidal_frequencies(16))
    output = loaded(text())
    assert output.logits.dtype == torch.float32
    assert torch.allclose(output.logits.exp().sum(-1), torch.ones(()), atol=1e-4)


def test_what_a_folder_lacks_is_drawn_as_in_a_new_model(tmp_path: Path) -> None:
    model: Any = make(stored_frequencies=True)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name in ("lm.inject.weight", "lm.deq.block.frequencies"):
        del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    both: Any = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    loaded, found = both
    assert found["missing_keys"] == {"lm.inject.weight", "lm.deq.block.frequencies"}
    assert abs(loaded.lm.inject.weight.std().item() - model.config.inject_std) < 0.03
    assert torch.allclose(loaded.lm.block.frequencies, sinusoidal_frequencies(16).double())
    assert torch.equal(loaded.lm.embedding.tables[0], model.lm.embedding.tables[0])


def test_copies_compute_the_same() -> None:
    model, tokens = make(weight_norm=True), text()
    expected = model(tokens).logits
    assert torch.equal(copy.deepcopy(model)(tokens).logits, expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(tokens).logits, expected)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("family", "options"), CASES)
def test_the_loss_is_that_of_the_labels_that_count(family: str, options: dict[str, Any], training: bool) -> None:
    model, tokens = make(family, **options).train(training), text()
    labels = tokens.clone()
    labels[0, 2:5] = -100
    output = model(tokens, labels=labels)
    counted = labels[:, 1:] != -100
    own = model.lm(tokens[:, :-1], tokens[:, 1:]).nll if training else None
    expected = -output.logits[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0] if own is None else own
    torch.testing.assert_close(output.loss, expected[counted].mean(), rtol=1e-9, atol=1e-9)
    half = model(tokens, labels=labels, num_items_in_batch=2 * counted.sum()).loss
    torch.testing.assert_close(half, output.loss / 2)
    kept = model(tokens, labels=labels, logits_to_keep=2)
    torch.testing.assert_close(kept.loss, output.loss)
    torch.testing.assert_close(kept.logits, output.logits[:, -2:])
    assert len(output.stats) == (0 if model.config.run_config().model.depth else 1)


def test_logits_may_be_left_out_in_training() -> None:
    model, tokens = make(cutoffs=[6, 12], div_val=2, logits_in_training=False).train(), text()
    output = model(tokens, labels=tokens)
    assert output.logits is None
    output.loss.backward()
    assert model(tokens).logits is not None
    assert model.eval()(tokens, labels=tokens).logits is not None


def test_the_jacobian_loss_is_added_in_training() -> None:
    model, tokens = make(jacobian_weight=0.5, jacobian_share=1.0).train(), text()
    output = model(tokens, labels=tokens)
    plain = model.eval()(tokens, labels=tokens)
    assert plain.jacobian is None
    assert output.jacobian > 0
    segment = model(tokens, labels=tokens, memory=model.empty_memory(3))
    torch.testing.assert_close(output.loss, segment.loss + 0.5 * output.jacobian, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", ["transformer", "trellisnet"])
def test_a_memory_goes_from_segment_to_segment_as_in_our_own_models(family: str) -> None:
    model, tokens = make(family, mem_len=7) if family == "transformer" else make(family), text(2, 12)
    memory = model.empty_memory(2)
    own = None
    for piece in tokens.split(4, dim=1):
        output = model(piece, labels=piece, memory=memory)
        expected = model.lm(piece[:, :-1], piece[:, 1:], own)
        assert expected.nll.mean().item() == pytest.approx(output.loss.item(), rel=1e-8)
        memory, own = output.memory, model.lm(piece, piece, own).memory
    with pytest.raises(ValueError, match="padding between a text and its memory"):
        model(tokens[:, :4], attention_mask=torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]), memory=memory)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("family", "options"), CASES)
def test_padding_on_either_side_changes_nothing(family: str, options: dict[str, Any], training: bool) -> None:
    model, lengths = make(family, **options).train(training), (9, 4, 1)
    left, mask = left_padded(text(), lengths, filling=10**9)  # what stands there need be no token
    right, behind = left.flip(1).clone(), mask.flip(1)
    right[behind == 0] = 0
    for row, length in enumerate(lengths):
        alone = left[row : row + 1, 9 - length :]
        expected = model(alone).logits
        found = model(left, attention_mask=mask).logits[row : row + 1, 9 - length :]
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
        found = model(right, attention_mask=behind).logits[row : row + 1, :length]
        torch.testing.assert_close(found, model(alone.flip(1)).logits, rtol=1e-8, atol=1e-8)


def test_the_loss_of_texts_of_several_lengths_is_that_of_each_alone() -> None:
    model, lengths = make(), (9, 4, 2)
    left, mask = left_padded(text(), lengths)
    rows = [left[row : row + 1, 9 - length :] for row, length in enumerate(lengths)]
    alone = sum(model(row, labels=row).loss * (row.shape[1] - 1) for row in rows) / (sum(lengths) - 3)
    for labels in (left, left.masked_fill(mask == 0, -100)):
        torch.testing.assert_close(model(left, attention_mask=mask, labels=labels).loss, alone, rtol=1e-8, atol=1e-8)


def test_what_cannot_be_is_refused() -> None:
    model, tokens = make(), text()
    with pytest.raises(ValueError, match="padding inside the text of row 1"):
        model(tokens[:, :3], attention_mask=torch.tensor([[1, 1, 1], [1, 0, 1], [0, 1, 1]]))
    with pytest.raises(ValueError, match="attention_mask has shape"):
        model(tokens, attention_mask=torch.ones(3, 4))
    with pytest.raises(ValueError, match="output_attentions is True"):
        model(tokens, output_attentions=True)
    with pytest.raises(ValueError, match="cannot be given 24"):
        model.resize_token_embeddings(V + 1)
    assert model.resize_token_embeddings(V) is model.lm.get_submodule("embedding")
    with pytest.raises(ValueError, match="does not support activation checkpointing"):
        model.activation_checkpointing_enable()
    with pytest.raises(ValueError, match="token ids range"):
        model(tokens, labels=tokens + V)
    with pytest.raises(ValueError, match="neither a memory nor training"):
        model(tokens[:, :1], past_key_values=model(tokens).past_key_values, memory=model.empty_memory(3))


def test_plain_tuples_and_states_on_demand() -> None:
    model, tokens = make(), text()
    output = model(tokens, labels=tokens, output_hidden_states=True)
    (z,) = output.hidden_states
    torch.testing.assert_close(model.lm.log_prob(z), output.logits)
    loss, logits = model(tokens, labels=tokens, return_dict=False, use_cache=False)[:2]
    assert torch.equal(loss, output.loss)
    assert torch.equal(logits, output.logits)
