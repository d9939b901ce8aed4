"""`generate` of Transformers on the equilibrium cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from huggingface_models import CASES, V, left_padded, make, text
from transformers import DynamicCache, pipeline

from equilibria.data import Vocabulary
from equilibria.interop.huggingface import EquilibriumCache, huggingface_tokenizer
from equilibria.models import generate

NEW = 7


def more(model: Any, tokens: torch.Tensor, **options: Any) -> Any:
    torch.manual_seed(3)
    settings = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    return model.generate(tokens, **{**settings, **options})


@pytest.mark.parametrize(("family", "options"), CASES)
def test_greedy_is_our_own_with_and_without_the_cache(family: str, options: dict[str, Any]) -> None:
    model, tokens = make(family, **options), text()
    expected = generate(model.lm, tokens, max_new_tokens=NEW, temperature=0)
    assert torch.equal(more(model, tokens), expected)
    assert torch.equal(more(model, tokens, use_cache=False), expected)
    assert torch.equal(more(model, tokens, prefill_chunk_size=4, past_key_values=EquilibriumCache()), expected)
    logits = model(tokens).logits[:, -1]
    assert (logits[0] - logits[1]).abs().max() > 1e-2, "what follows should depend on the text"


@pytest.mark.parametrize("search", [{"num_beams": 3, "num_return_sequences": 2}, {"do_sample": True, "top_k": 8}])
@pytest.mark.parametrize(("family", "options"), CASES)
def test_beams_and_samples_do_not_depend_on_the_cache(family: str, options: dict[str, Any], search: dict[str, Any]) -> None:
    model, tokens = make(family, **options), text()
    cached = more(model, tokens, return_dict_in_generate=True, output_scores=True, **search)
    whole = more(model, tokens, return_dict_in_generate=True, output_scores=True, use_cache=False, **search)
    assert torch.equal(cached.sequences, whole.sequences)
    for one, other in zip(cached.scores, whole.scores, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)  # Transformers makes them float32
    assert isinstance(cached.past_key_values, EquilibriumCache)


@pytest.mark.parametrize("search", [{}, {"num_beams": 2}])
@pytest.mark.parametrize(("family", "options"), CASES)
def test_texts_of_several_lengths_go_on_as_each_alone(family: str, options: dict[str, Any], search: dict[str, Any]) -> None:
    model, lengths = make(family, **options), (9, 3, 1)
    tokens, mask = left_padded(text(), lengths)
    together = more(model, tokens, attention_mask=mask, **search)
    again = more(model, tokens, attention_mask=mask, use_cache=False, **search)
    chunks = more(
        model, tokens, attention_mask=mask, prefill_chunk_size=2, past_key_values=EquilibriumCache(), **search
    ) if not search else together  # fmt: skip
    assert torch.equal(together, again)
    assert torch.equal(together, chunks)
    for row, length in enumerate(lengths):
        alone = more(model, tokens[row : row + 1, 9 - length :], **search)
        assert torch.equal(together[row : row + 1, 9 - length :], alone)


@pytest.mark.parametrize("family", ["transformer", "trellisnet"])
def test_a_pipeline_continues_texts_of_several_lengths(family: str) -> None:
    model, tokenizer = make(family), huggingface_tokenizer(Vocabulary(["<eos>", "<unk>", *"abcdefghijklmnopqrstu"]))
    write: Any = pipeline("text-generation", model=model, tokenizer=tokenizer)
    settings = {"max_new_tokens": NEW, "do_sample": False, "return_full_text": False, "skip_special_tokens": False}
    prompts = ["a b c d", "e", "f\ng\n\nh"]
    together = [each[0]["generated_text"] for each in write(prompts, batch_size=3, **settings)]
    assert together == [write(prompt, **settings)[0]["generated_text"] for prompt in prompts]
    longer = more(model, torch.tensor([tokenizer.encode(prompts[0])]))[0, 4:].tolist()
    said: Any = tokenizer.decode(longer)
    assert together[0].split() == said.split()


def test_a_returned_cache_goes_on() -> None:
    model, tokens = make(), text()
    first = more(model, tokens, return_dict_in_generate=True)
    cache = first.past_key_values
    assert cache.get_seq_length() == 9 + NEW - 1
    longer = more(model, first.sequences, past_key_values=cache, max_new_tokens=3)
    assert torch.equal(longer, more(model, tokens, max_new_tokens=NEW + 3))


def test_the_window_is_that_of_the_configuration() -> None:
    narrow, wide, tokens = make(window=2), make(window=100), text()
    for model in (narrow, wide):
        expected = generate(model.lm, tokens, max_new_tokens=NEW, temperature=0, window=model.config.window)
        assert torch.equal(more(model, tokens), expected)
    assert not torch.allclose(narrow(tokens).logits, wide(tokens).logits)
    assert narrow(tokens).past_key_values.state.layers[0].keys.shape[2] == 1


def test_a_proposal_may_be_taken_back_where_nothing_was_dropped() -> None:
    model, tokens = make(mem_len=0), text(1)
    assert model.window is None
    repeated = torch.cat((tokens, tokens), 1)
    assert torch.equal(more(model, repeated, prompt_lookup_num_tokens=3), more(model, repeated))
    for other in (make(), make("trellisnet")):
        with pytest.raises(ValueError, match="assisted generation is not supported"):
            more(other, tokens, prompt_lookup_num_tokens=3)
        with pytest.raises(ValueError, match="has dropped the positions"):
            other(tokens).past_key_values.crop(-1)


def test_rows_of_a_cache_can_be_chosen_and_repeated() -> None:
    model, tokens, following = make(), text(), text(3, 1, seed=2)
    expected = model(following, past_key_values=model(tokens).past_key_values).logits
    cache = model(tokens).past_key_values
    cache.batch_repeat_interleave(2)
    assert cache.batch_size == 6
    found = model(following.repeat_interleave(2, 0), past_key_values=cache).logits
    torch.testing.assert_close(found, expected.repeat_interleave(2, 0), rtol=1e-9, atol=1e-9)
    cache = model(tokens).past_key_values
    cache.batch_select_indices(torch.tensor([2]))
    found = model(following[2:], past_key_values=cache).logits
    torch.testing.assert_close(found, expected[2:], rtol=1e-9, atol=1e-9)
    cache.reset()
    assert (cache.get_seq_length(), cache.is_initialized, cache.batch_size) == (0, False, -1)


def test_what_does_not_go_is_refused() -> None:
    model, tokens = make(), text()
    with pytest.raises(ValueError, match="call model"):
        more(model.train(), tokens)
    model.eval()
    with pytest.raises(ValueError, match="temprature"):
        more(model, tokens, temprature=0.3)
    full = DynamicCache()
    full.update(torch.zeros(3, 1, 9, 4), torch.zeros(3, 1, 9, 4), 0)
    with pytest.raises(TypeError, match="past_key_values is a DynamicCache"):
        model(tokens, past_key_values=full)
    assert torch.equal(more(model, tokens, past_key_values=DynamicCache()), more(model, tokens))
    right, mask = tokens.clone(), torch.ones_like(tokens)
    mask[1, 5:] = 0
    with pytest.raises(ValueError, match="pad before a text or behind it, and before it where it is to be continued"):
        more(model, right, attention_mask=mask, eos_token_id=V - 1)
