"""Our tokenizers in the form of Hugging Face give the same ids and the same text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from equilibria.data import BytePair, Bytes, Tokenizer, Vocabulary
from equilibria.interop.huggingface import DEQTransformerConfig, DEQTransformerForCausalLM, huggingface_tokenizer

SENTENCES = ["The cat , sat <unk> @-@ ##s\n", "", " = x y =", "the\x1ccat\u00a0 sat"]
KINDS: dict[str, tuple[Tokenizer, str | None]] = {
    "words": (Vocabulary.build(SENTENCES), "<eos>"),
    "lower": (Vocabulary.build([*SENTENCES, "<unk>"], lower_case=True), "<eos>"),
    "symbols": (Vocabulary(["a", "b", "<unk>"], end_of_line=False), None),
    "bytes": (Bytes(), "\u00ff"),
    "letters": (Bytes(b" abcdefghijklmnopqrstuvwxyz\n"), None),
    "documents": (BytePair.train(["the cat sat on the mat\n" * 9], 300, "<|endoftext|>"), "<|endoftext|>"),
    "byte-pair": (BytePair.train("the cat sat on the mat, and so did Zoë\n" * 9, 320), "\u00ff"),
}
LOADED: dict[str, PreTrainedTokenizerBase] = {}


@pytest.fixture(scope="module", params=sorted(KINDS))
def kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    huggingface_tokenizer(KINDS[request.param][0]).save_pretrained(folder)
    LOADED[request.param] = AutoTokenizer.from_pretrained(folder)
    return request.param


TEXTS = [
    "the cat\nsat",
    "\n\nthe\n",
    "the <unk> zebra <eos> cat ##s\n , sat",
    "a<unk>b <eos>c",
    "  the\tcat \n\n x =\x1ccat\u00a0sat",
    "h\u00e9llo \u00ff world\n\n  x",
    "\u65e5\u672c\u8a9e <|endoftext|>\x00 \u00ff\u00ff",
    "",
]


def same(kind: str, text: str) -> None:
    ours, theirs = KINDS[kind][0], LOADED[kind]
    if kind == "letters":
        text = "".join(letter for letter in text.lower() if letter in " abcdefghijklmnopqrstuvwxyz\n")
    ids = ours.encode(text)
    assert theirs(text)["input_ids"] == ids
    assert theirs.decode(ids) == ours.decode(ids)


def test_the_same_ids_and_the_same_text(kind: str) -> None:
    for text in TEXTS:
        same(kind, text)
    assert LOADED[kind].eos_token == KINDS[kind][1]
    assert len(LOADED[kind]) == KINDS[kind][0].size


PIECES = [*"aZ\u00e9 \n\t\u00ff", "<unk>", "<eos>", " the ", "cat", "##", "\u65e5", "\x1f"]


@settings(max_examples=40)
@given(text=st.lists(st.sampled_from(PIECES)).map("".join))
def test_for_every_text(kind: str, text: str) -> None:
    same(kind, text)


def test_every_id_decodes_alike(kind: str) -> None:
    ours, theirs = KINDS[kind][0], LOADED[kind]
    ids = list(range(ours.size))
    assert theirs.decode(ids) == ours.decode(ids)
    for i in ids:
        assert theirs.decode([i]) == ours.decode([i])


@pytest.mark.parametrize("kind", ["letters"], indirect=True)
def test_what_has_no_token_is_refused(kind: str) -> None:
    with pytest.raises(Exception, match="Missing"):
        LOADED[kind]("Zebra")


def test_a_tokenizer_of_the_hub_for_a_new_model(tmp_path: Path) -> None:
    backend = Backend(WordLevel({"[PAD]": 0, "[UNK]": 1, "the": 2, "cat": 3, "sat": 4}, unk_token="[UNK]"))
    backend.pre_tokenizer = WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, padding_side="left")
    model: Any = DEQTransformerForCausalLM(DEQTransformerConfig(vocab_size=len(tokenizer), d_model=8, n_head=2)).eval()
    batch = tokenizer(["the cat", "the cat sat the cat"], return_tensors="pt", padding=True)
    ids = batch["input_ids"], batch["attention_mask"]
    longer = model.generate(ids[0], attention_mask=ids[1], max_new_tokens=3, do_sample=False)
    assert longer.shape == (2, 8)
