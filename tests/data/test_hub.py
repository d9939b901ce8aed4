"""Data sets and tokenizers that Hugging Face's libraries made; nothing is fetched."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from generated import generated_text
from tokenizers import Tokenizer as Theirs
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

from equilibria.data import BytePair, TextOptions, load_tokenizer, read_tokenizer, text_corpus
from equilibria.solution import UserError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:(datasets|pyarrow|multiprocess|dill|fsspec).*")
datasets = pytest.importorskip("datasets")
DOCUMENTS = [f"{i}. " + generated_text(i, 60).strip() for i in range(30)]
END = "<|endoftext|>"


@pytest.fixture(autouse=True)
def _quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EQUILIBRIA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "theirs"))
    datasets.disable_progress_bars()


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """The documents as .jsonl files of three splits."""
    folder = tmp_path / "files"
    folder.mkdir()
    for name, documents in zip(
        ("train", "validation", "test"), (DOCUMENTS[:20], DOCUMENTS[20:25], DOCUMENTS[25:]), strict=True
    ):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text, "n": 1}) + "\n" for text in documents))
    return folder


def saved(folder: Path, **splits: list[str]) -> str:
    made = {name: datasets.Dataset.from_dict({"n": range(len(texts)), "text": texts}) for name, texts in splits.items()}
    datasets.DatasetDict(made).save_to_disk(str(folder))
    return str(folder)


def test_a_data_set_gives_the_tokens_of_its_files(files: Path, tmp_path: Path) -> None:
    expected = text_corpus(files, vocab_size=300)
    on_disk = saved(tmp_path / "saved", train=DOCUMENTS[:20], validation=DOCUMENTS[20:25], test=DOCUMENTS[25:])
    for chosen in (
        TextOptions(dataset=str(files)),
        TextOptions(dataset=on_disk),
        TextOptions(dataset=str(files), streaming=True),
    ):
        for _ in range(2):  # made and, where it is kept, read
            corpus = text_corpus(options=chosen, vocab_size=300)
            for mine, other in (
                (corpus.train, expected.train),
                (corpus.valid, expected.valid),
                (corpus.test, expected.test),
            ):
                assert torch.equal(mine.tokens.long(), other.tokens)
                assert mine.text_bytes == other.text_bytes
    assert len(list((tmp_path / "cache" / "tokens").iterdir())) == 1, "what is read as it arrives is kept"


def test_one_split_is_train_whatever_its_name(tmp_path: Path) -> None:
    name = saved(tmp_path / "saved", everything=DOCUMENTS)
    notes: list[str] = []
    corpus = text_corpus(
        options=TextOptions(dataset=name, valid_share=0.2, test_share=0.2), vocab_size=300, note=notes.append
    )
    assert min(split.documents or 0 for split in (corpus.train, corpus.valid, corpus.test)) > 3
    assert len(notes) == 1
    assert notes[0].startswith("out of train: 0.2 of it for valid, 0.2 of it for test")
    datasets.Dataset.from_dict({"text": DOCUMENTS}).save_to_disk(str(tmp_path / "one"))
    again = text_corpus(options=TextOptions(dataset=str(tmp_path / "one"), valid_share=0.2, test_share=0.2), vocab_size=300)
    assert again.fingerprint == corpus.fingerprint


def test_splits_that_are_not_used_are_named(tmp_path: Path) -> None:
    name = saved(tmp_path / "saved", train=DOCUMENTS, extra=DOCUMENTS[:2])
    notes: list[str] = []
    text_corpus(options=TextOptions(dataset=name), vocab_size=300, note=notes.append)
    assert notes[0] == "its splits extra are not used"
    with pytest.raises(UserError, match="has the splits a, b, but none called train"):
        text_corpus(options=TextOptions(dataset=saved(tmp_path / "odd", a=DOCUMENTS, b=DOCUMENTS)))


def test_a_field_that_is_not_there_or_no_text(tmp_path: Path) -> None:
    name = saved(tmp_path / "saved", train=DOCUMENTS)
    with pytest.raises(UserError, match="saved has no field 'body'; its fields are n, text: name one with --text-field"):
        text_corpus(options=TextOptions(dataset=name, text_field="body"))
    with pytest.raises(UserError, match=r"the field 'n' of .*saved holds int64, not text; name one .* --text-field: text"):
        text_corpus(options=TextOptions(dataset=name, text_field="n"))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ConnectionError("Couldn't reach"), "cannot be reached; fetch it on a machine with a network"),
        (datasets.exceptions.DatasetNotFoundError("Dataset 'x' doesn't exist on the Hub"), "check the name, or log in"),
        (datasets.exceptions.DatasetNotFoundError("Dataset 'x' is a gated dataset on the Hub"), "accept its terms"),
        (ValueError("Config name is missing.\nPlease pick one among: ['a', 'b']"), "pick one among: .*--dataset-config"),
        (RuntimeError("Dataset scripts are no longer supported"), "Dataset scripts are no longer supported"),
    ],
)
def test_what_cannot_be_had_is_one_line(error: Exception, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UserError, match=said) as caught:
        text_corpus(options=TextOptions(dataset="someone/something"))
    assert "someone/something" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        UserError, match=r'the package datasets is missing; install it with: pip install "equilibria\[hf\]"'
    ):
        text_corpus(options=TextOptions(dataset="someone/something"))


# -- tokenizers ------------------------------------------------------------------------------------------------------


def word_tokenizer(folder: Path, *, special: tuple[str, ...] = ("[PAD]", "</s>"), gap: int = 0) -> Path:
    """One as models of the Hub have: words, marks around every text, and cut to eight tokens."""
    words = ["[PAD]", "</s>", "the", "cat", "In", "."]
    made = Theirs(WordLevel({word: i + gap * (i > 2) for i, word in enumerate(words)}, unk_token="[PAD]"))
    made.pre_tokenizer = Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    made.add_special_tokens(list(special))
    made.post_processor = TemplateProcessing(single="[PAD] $A </s>", special_tokens=[("[PAD]", 0), ("</s>", 1)])  # pyright: ignore
    made.enable_truncation(8)
    made.enable_padding(length=8)
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    return folder


def test_a_loaded_tokenizer_adds_and_cuts_nothing(tmp_path: Path, files: Path) -> None:
    folder = word_tokenizer(tmp_path / "model")
    tokenizer = read_tokenizer(str(folder))
    assert tokenizer.encode("the cat " * 9) == [2, 3] * 9
    assert tokenizer.encode("the </s>") == [2, 0, 0, 0], "not the mark, but </, s and > as unknown words"
    assert (tokenizer.end_of_text, tokenizer.end_id, tokenizer.size) == ("</s>", 1, 6)
    by_name = [read_tokenizer(str(folder / "tokenizer.json")), read_tokenizer(str(folder))]
    corpora = [text_corpus(files, TextOptions(tokenizer=str(place))) for place in (folder, folder / "tokenizer.json")]
    assert [each.end_id for each in by_name] == [1, 1]
    assert corpora[0].fingerprint == corpora[1].fingerprint
    assert int((corpora[0].train.tokens == 1).sum()) == 19, "ends between twenty documents"


def test_ids_may_have_gaps(tmp_path: Path) -> None:
    tokenizer = read_tokenizer(str(word_tokenizer(tmp_path / "model", gap=10)))
    assert tokenizer.size == 16 == max(tokenizer.encode("cat In .")) + 1
    tokenizer.decode(range(16))


@pytest.mark.parametrize("declared", ["</s>", {"content": "</s>", "special": True}, "the", None])
def test_the_end_of_text_is_the_declared_one(declared: Any, tmp_path: Path) -> None:
    folder = word_tokenizer(tmp_path / "model", special=("[PAD]",) if declared is None else ("[PAD]", "</s>"))
    if declared is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": declared}))
    tokenizer = read_tokenizer(str(folder))
    expected = {"the": ("the", 2, 6), None: (END, 6, 7)}.get(
        declared if isinstance(declared, str | None) else "", ("</s>", 1, 6)
    )
    assert (tokenizer.end_of_text, tokenizer.end_id, tokenizer.size) == expected
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert isinstance(again, BytePair)
    assert (again.end_of_text, again.end_id, again.size) == expected
    assert tokenizer.end_id not in tokenizer.encode(f"cat {tokenizer.end_of_text}") or declared == "the"


def test_what_is_no_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.json").write_text("{}")
    for name, said in {
        str(tmp_path / "empty"): "has no tokenizer.json; name a folder that a fast tokenizer was saved in",
        str(tmp_path / "bad.json"): "bad.json is no tokenizer that can be read",
        str(tmp_path / "absent"): "there is no tokenizer .*absent",
        "absent.json": "there is no tokenizer absent.json",
        "no name!": "there is no tokenizer no name!, neither as a file or folder here nor on the Hugging Face Hub",
    }.items():
        with pytest.raises(UserError, match=said) as error:
            read_tokenizer(name)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("RepositoryNotFoundError", "check the name, or log in with: hf auth login"),
        ("GatedRepoError", "open only to those who accepted its terms"),
        ("LocalEntryNotFoundError", "the Hugging Face Hub cannot be reached; fetch it on a machine with a network"),
        ("EntryNotFoundError", "has no tokenizer.json on the Hugging Face Hub"),
    ],
)
def test_a_tokenizer_that_cannot_be_fetched(name: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    kind = getattr(huggingface_hub.errors, name)

    def fail(*_: Any, **__: Any) -> None:
        raise kind.__new__(kind)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(UserError, match=said):
        read_tokenizer("someone/something")


def test_a_tokenizer_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    folder = word_tokenizer(tmp_path / "model")
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda name, file: str(folder / file))
    assert read_tokenizer("someone/something").end_of_text == "</s>"
