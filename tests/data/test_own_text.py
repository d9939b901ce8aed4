"""A text of one's own, from files of every kind, as three splits of tokens."""

from __future__ import annotations

import errno
import gzip
import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, pairwise
from pathlib import Path

import pytest
import torch
from generated import generated_text
from hypothesis import given
from hypothesis import strategies as st

from equilibria.data import BytePair, Corpus, TextOptions, load_tokenizer, text_corpus
from equilibria.data.carve import LONGEST_PIECE, Carving, pieces, whole
from equilibria.data.numbered_text import _number, _sample
from equilibria.data.text_files import find_text_files
from equilibria.solution import UserError

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
END = "<|endoftext|>"
DOCUMENTS = [f"{i}. " + generated_text(i, 60).strip() for i in range(40)]


def write_txt(folder: Path, documents: list[str], name: str = "part") -> None:
    for i, document in enumerate(documents):
        (folder / f"{name}-{i}.txt").write_bytes(document.encode())


def write_txt_gz(folder: Path, documents: list[str], name: str = "part") -> None:
    for i, document in enumerate(documents):
        (folder / f"{name}-{i}.txt.gz").write_bytes(gzip.compress(document.encode()))


def write_jsonl(folder: Path, documents: list[str], name: str = "part") -> None:
    lines = "".join(json.dumps({"id": i, "text": document}) + "\n" for i, document in enumerate(documents))
    (folder / f"{name}.jsonl").write_text(lines)


def write_jsonl_gz(folder: Path, documents: list[str], name: str = "part") -> None:
    lines = "".join(json.dumps({"text": document}, ensure_ascii=False) + "\r\n" for document in documents)
    (folder / f"{name}.jsonl.gz").write_bytes(gzip.compress(lines.encode("utf-8-sig")))


def write_parquet(folder: Path, documents: list[str], name: str = "part") -> None:
    table = pyarrow.table({"id": range(len(documents)), "text": documents})
    parquet.write_table(table, folder / f"{name}.parquet", row_group_size=7)


WRITERS: list[Callable[..., None]] = [write_txt, write_txt_gz, write_jsonl, write_jsonl_gz, write_parquet]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "texts").mkdir()
    return tmp_path / "texts"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EQUILIBRIA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def texts(corpus: Corpus) -> list[str]:
    return [corpus.tokenizer.decode(split.tokens.tolist()) for split in (corpus.train, corpus.valid, corpus.test)]


def options(**changes: object) -> TextOptions:
    return TextOptions(**{"valid_share": 0.2, "test_share": 0.2, **changes})  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("documents", [DOCUMENTS, DOCUMENTS[:1], ["\n".join(DOCUMENTS)], DOCUMENTS * 6], ids=len)
def test_every_kind_of_file_gives_the_same_tokens(documents: list[str], tmp_path: Path) -> None:
    found = []
    for write in WRITERS:
        place = tmp_path / write.__name__
        place.mkdir()
        unlike = [f"{i}{document}" for i, document in enumerate(documents)]  # equal files would be left out
        write(place, unlike)
        found.append(text_corpus(place, options(), vocab_size=300))
    for corpus in found:
        assert corpus.fingerprint == found[0].fingerprint
        assert torch.equal(corpus.valid.tokens, found[0].valid.tokens)
        assert torch.equal(corpus.test.tokens, found[0].test.tokens)
        assert corpus.test_text == found[0].test_text


def test_few_documents_are_one_text_whose_end_is_held_out(folder: Path) -> None:
    write_jsonl(folder, DOCUMENTS)
    corpus = text_corpus(folder, options(), vocab_size=300)
    train, valid, test = texts(corpus)
    # A cut may lie within a document, where no end of text is; between the lines of one.
    joined = "".join(train + valid + test).replace(END, "").replace("\n", "")
    assert joined == "".join(DOCUMENTS).replace("\n", "")
    total = sum(len(document.encode()) for document in DOCUMENTS)
    for split, share in ((corpus.train, 0.6), (corpus.valid, 0.2), (corpus.test, 0.2)):
        assert split.text_bytes is not None
        assert abs(split.text_bytes / total - share) < 0.05
    assert [split.text_bytes for split in (corpus.train, corpus.valid, corpus.test)] == [
        len(text.replace(END, "").encode()) for text in (train, valid, test)
    ]
    for text, split in ((train, corpus.train), (valid, corpus.valid)):
        assert text.count(END) + 1 == split.documents


def test_many_documents_are_drawn_by_their_text_alone(folder: Path, tmp_path: Path) -> None:
    documents = [f"{i} {document}" for i, document in enumerate(DOCUMENTS * 10)]
    write_jsonl(folder, documents)
    before = [text.split(END) for text in texts(text_corpus(folder, options(), vocab_size=300))]
    assert sorted(chain(*before)) == sorted(documents)
    assert all(len(split) > 40 for split in before)
    for split in before:  # in their order
        assert split == [document for document in documents if document in set(split)]
    other = tmp_path / "other"
    other.mkdir()
    write_jsonl(other, ["new", *reversed(documents[5:])])
    after = [set(text.split(END)) for text in texts(text_corpus(other, options(), vocab_size=300))]
    for old, new in zip(before, after, strict=True):
        assert set(old) - set(documents[:5]) == new - {"new"}


def test_a_long_document_gives_its_end_to_the_others(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("equilibria.data.documents.LONG", 500)
    long = generated_text(1, 3000)
    write_txt(folder, [*DOCUMENTS[:5], long])
    train, valid, test = texts(text_corpus(folder, options(), vocab_size=300))
    held_out = [text.split(END)[-1] for text in (train, valid, test)]
    assert "".join(held_out) == long
    assert all(part.startswith(("The", "In", "\n")) for part in held_out), "cut between lines"


@given(st.lists(st.text(st.sampled_from("ab \né"), max_size=30), max_size=12), st.integers(0, 40))
def test_carving_loses_nothing(documents: list[str], long: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("equilibria.data.documents.LONG", long)
        carving = Carving.plan(documents, 0.25, 0.25)
        parts = list(carving.parts(documents))
    assert "".join(part.text for part in parts) == "".join(each for each in documents if each.strip())
    assert all(part.text for part in parts)
    for split in range(3):
        mine = [part for part in parts if part.split == split]
        assert not mine or mine[0].begins


def test_pieces_do_not_depend_on_how_a_file_is_read() -> None:
    class Blocks:
        def __init__(self, size: int) -> None:
            self.size = size

        def blocks(self):
            return (TEXT[i : i + self.size] for i in range(0, len(TEXT), self.size))

    TEXT = "word after word " * 40 + "x" * 300 + " " + "\n".join(DOCUMENTS)
    expected = list(pieces(TEXT, 20, 100))
    assert "".join(expected) == TEXT
    assert max(map(len, expected)) == 100 < LONGEST_PIECE
    for size in (1, 7, 1000):
        assert list(pieces(Blocks(size), 20, 100)) == expected  # pyright: ignore[reportArgumentType]


def test_a_sample_is_spread_over_the_text() -> None:
    sample, share = _sample((f"{i:03}" for i in range(1000)), 600)
    assert 300 <= sum(map(len, sample)) <= 600
    steps = {int(after) - int(before) for before, after in pairwise(sample)}
    assert steps == {8}
    assert share == pytest.approx(1 / 8)
    assert _sample(["ab", "c"], 600) == (["ab", "c"], 1.0)


def test_names_say_which_split_a_file_is_of(folder: Path) -> None:
    for name, documents in {
        "train-2": ["b"],
        "train-10": ["c"],
        "Validation": ["v"],
        "dev_1": ["d"],
        "testing": ["t"],
    }.items():
        write_jsonl(folder, [f"{each} and more of it" for each in documents], name)
    (folder / "train").mkdir()
    write_txt(folder / "train", ["a and more of it"], "test")  # the outer name counts
    (folder / "trainer.txt").write_text("not named as a split")
    notes: list[str] = []
    corpus = text_corpus(folder, vocab_size=300, note=notes.append)
    first = [[document[0] for document in text.split(END)] for text in texts(corpus)]
    assert first == [["a", "b", "c"], ["d", "v"], ["t"]]
    assert [split.documents for split in (corpus.train, corpus.valid, corpus.test)] == [3, 2, 1]
    assert any("1 file left out, for only others are named train" in note and "trainer.txt" in note for note in notes)


def test_what_is_missing_is_taken_out_of_train(folder: Path) -> None:
    write_jsonl(folder, DOCUMENTS, "train")
    (folder / "test.txt").write_text("the test itself")
    notes: list[str] = []
    train, valid, test = texts(text_corpus(folder, options(), vocab_size=300, note=notes.append))
    assert test == "the test itself"
    assert (train + valid).replace(END, "").replace("\n", "") == "".join(DOCUMENTS).replace("\n", "")
    assert notes == ["out of train: 0.2 of it for valid; the end of the text, and the end of every document above 1 MiB"]


def test_what_is_hidden_of_another_kind_or_there_twice_is_left_out(folder: Path) -> None:
    write_txt(folder, DOCUMENTS[:3])
    (folder / ".hidden.txt").write_text("hidden")
    (folder / ".git").mkdir()
    (folder / ".git" / "a.txt").write_text("hidden")
    (folder / "table.csv").write_text("1,2")
    (folder / "broken.txt").symlink_to(folder / "nowhere")
    (folder / "round").symlink_to(folder)
    (folder / "deep").mkdir()
    (folder / "deep" / "copy.TXT").write_bytes((folder / "part-0.txt").read_bytes())
    (folder / "linked.txt").symlink_to(folder / "part-1.txt")
    files = find_text_files(folder)
    assert sorted(path.read_text() for path in files.files[0]) == sorted(DOCUMENTS[:3])
    assert any(note == "2 files of other kinds left out" for note in files.notes)
    assert any(note.startswith("2 files left out as equal to others") for note in files.notes)
    (folder / "only").mkdir()
    write_txt(folder / "only", ["the same"], "train")
    write_txt(folder / "only", ["the same"], "test")
    assert any(
        note.startswith("warning: ") and "is in train as well" in note for note in find_text_files(folder / "only").notes
    )


def test_empty_documents_are_left_out(folder: Path) -> None:
    write_jsonl(folder, ["", "one", " \n", "two", "three and four", "five"])
    with (folder / "part.jsonl").open("a") as file:
        file.write('\n{"text": null}\n\n')
    corpus = text_corpus(folder, options(), vocab_size=300)
    assert corpus.train.documents == 3


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("block", [3, 1 << 22])
def test_byte_order_marks(encoding: str, block: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("equilibria.data.documents.LONG", 1 if block == 3 else 1 << 20)
    monkeypatch.setattr("equilibria.data.documents.BLOCK", max(4, block))
    text = "Zoë reads 中文 😀.\nAnd writes.\n" * 5
    (folder / "train.txt").write_bytes(text.encode(encoding))
    (folder / "valid.txt").write_text("valid")
    (folder / "test.txt").write_text("test")
    corpus = text_corpus(folder, vocab_size=300)
    assert texts(corpus)[0] == text
    assert corpus.train.text_bytes == len(text.encode())


def test_halves_of_surrogate_pairs_are_replaced(folder: Path) -> None:
    (folder / "a.jsonl").write_text('{"text": "odd \\ud800 one, even \\ud83d\\ude00 one"}\n{"text": "another line of it"}')
    corpus = text_corpus(folder, options(), vocab_size=300)
    assert "odd \ufffd one, even 😀" in "".join(texts(corpus))


def test_a_text_that_spells_the_end_of_text_has_none(folder: Path) -> None:
    write_jsonl(folder, [f"before {END} after", f"{END}{END}", "one", "two\nthree\nfour five\n"])
    corpus = text_corpus(folder, options(), vocab_size=300)
    assert isinstance(corpus.tokenizer, BytePair)
    ends = int((corpus.train.tokens == corpus.tokenizer.end_id).sum())
    assert ends == (corpus.train.documents or 0) - 1 == 1


def test_the_first_documents(folder: Path) -> None:
    write_jsonl(folder, DOCUMENTS)
    corpus = text_corpus(folder, options(max_documents=10), vocab_size=300)
    joined = "".join(texts(corpus)).replace(END, "").replace("\n", "")
    assert joined == "".join(DOCUMENTS[:10]).replace("\n", "")


def test_one_file_will_do(folder: Path) -> None:
    (folder / "story.txt").write_text(generated_text(0, 4000))
    train, valid, test = texts(text_corpus(folder / "story.txt", vocab_size=300))
    assert train + valid + test == generated_text(0, 4000)


BAD = {
    "bad.jsonl": [
        (b'{"text": "a"}\n{"text": \n', "line 2 of .*bad.jsonl is not JSON .*; write one JSON object on each line"),
        (b'{"text": "a"}\n["text"]\n', "line 2 of .*bad.jsonl is no JSON object but of type list"),
        (b'{"body": "a", "title": "b"}\n', "has no field 'text'; its fields are body, title: name one with --text-field"),
        (b'{"text": ["a"]}\n', "the field 'text' of line 1 of .*bad.jsonl is no text but of type list"),
        (b'{"text": "caf\xe9"}\n', "line 1 of .*bad.jsonl is not UTF-8"),
        (b"[" * 100_000, "line 1 of .*bad.jsonl is not JSON"),
    ],
    "bad.txt": [
        (b"one\ntwo\ncaf\xe9", "line 3 of .*bad.txt is not UTF-8; save the file in that encoding"),
        (b"", "bad.txt is empty; put text into it"),
        (b"two", "bad.txt has too little text for a valid split; give more, or a larger --valid-share"),
    ],
    "bad.txt.gz": [
        (b"no gzip", "bad.txt.gz is damaged, or not compressed by gzip"),
        (gzip.compress(b"a" * 999)[:-12], "damaged"),
    ],
    "bad.parquet": [(b"PAR1 no", "bad.parquet cannot be read as Parquet")],
    "bad.csv": [(b"a", "there is no text in .*: none of its 1 files ends in .txt")],
    "valid.txt": [(b"a", "valid.txt is named as if it were to validate or test on, but nothing in .* is named train")],
    "dataset_info.json": [(b"{}", "is a data set that the library datasets saved; name it with --dataset")],
}


@pytest.mark.parametrize(("name", "content", "said"), [(name, *case) for name, cases in BAD.items() for case in cases])
def test_what_cannot_be_read_is_named(name: str, content: bytes, said: str, folder: Path) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=said) as error:
        text_corpus(folder, vocab_size=300)
    assert "\n" not in str(error.value)


def test_a_parquet_file_without_the_field_is_named(folder: Path) -> None:
    parquet.write_table(pyarrow.table({"body": ["a"], "n": [1]}), folder / "a.parquet")
    with pytest.raises(UserError, match=r"a.parquet has no field 'text'; its fields are body, n: name one"):
        text_corpus(folder)
    with pytest.raises(UserError, match=r"the field 'n' of .*a.parquet holds int64, not text"):
        text_corpus(folder, TextOptions(text_field="n"))


def test_parquet_without_its_package_names_the_extra(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parquet(folder, DOCUMENTS)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r'the package pyarrow is missing; install it with: pip install "equilibria\[hf\]"'):
        text_corpus(folder)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"valid_share": 0.0}, "--valid-share is 0.0; give a share above 0, at most 0.5"),
        ({"test_share": 0.6}, "--test-share is 0.6"),
        ({"valid_share": 0.5, "test_share": 0.5}, "leave nothing to train on"),
        ({"max_documents": 0}, "--max-documents is 0; give at least 1"),
        ({"streaming": True}, "--streaming is for a data set; name one with --dataset"),
        ({"dataset_config": "x"}, "--dataset-config is for a data set"),
    ],
)
def test_options_out_of_range(values: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        TextOptions(**values)


def test_a_folder_and_a_data_set_are_one_too_many(folder: Path) -> None:
    with pytest.raises(UserError, match="one of the two"):
        text_corpus(folder, TextOptions(dataset="x"))
    with pytest.raises(UserError, match="leave --vocab-size out, or --tokenizer"):
        text_corpus(folder, TextOptions(tokenizer="x"), vocab_size=300)


# -- what is kept of a large text ------------------------------------------------------------------------------------


def large(folder: Path, chosen: TextOptions | None = None, vocab_size: int | None = 300, **rest) -> Corpus:
    return text_corpus(folder, chosen or options(), vocab_size=vocab_size, large=0, **rest)


def test_a_large_text_is_kept_and_is_the_same(folder: Path, cache: Path, tmp_path: Path, capsys) -> None:
    write_jsonl(folder, DOCUMENTS)
    small = text_corpus(folder, options(), vocab_size=300)
    assert not cache.exists()
    for _ in range(2):
        corpus = large(folder)
        assert corpus.train.tokens.dtype == torch.int32
        for mine, other in zip(
            (corpus.train, corpus.valid, corpus.test), (small.train, small.valid, small.test), strict=True
        ):
            assert torch.equal(mine.tokens.long(), other.tokens)
            assert (mine.text_bytes, mine.documents) == (other.text_bytes, other.documents)
        assert corpus.test_text == small.test_text
        assert corpus.tokenizer.decode(range(300)) == small.tokenizer.decode(range(300))
    (kept,) = (cache / "tokens").iterdir()
    folder.rename(tmp_path / "moved")
    large(tmp_path / "moved")
    assert [path.name for path in (cache / "tokens").iterdir()] == [kept.name]
    (kept / "train.int32").write_bytes(b"0000" + (kept / "train.int32").read_bytes()[4:])
    assert torch.equal(large(tmp_path / "moved").train.tokens.long(), small.train.tokens)
    assert f"the kept text in {kept} is damaged; its tokens are made again" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change",
    [{"vocab_size": 290}, {"chosen": options(max_documents=9)}, {"chosen": options(test_share=0.3)}, "text", "tokenizer"],
)
def test_what_decides_the_tokens_decides_what_is_read(
    change: dict | str, folder: Path, cache: Path, tmp_path: Path
) -> None:
    write_jsonl(folder, DOCUMENTS)
    before = large(folder)
    if change == "text":
        write_jsonl(folder, [*DOCUMENTS[1:], DOCUMENTS[0]])
        after = large(folder)
    elif change == "tokenizer":
        BytePair.train("abc" * 50, 270, END).save(tmp_path)
        after = large(folder, options(tokenizer=str(tmp_path)), None)
        assert after.tokenizer.size < 270
    else:
        assert isinstance(change, dict)
        after = large(folder, **change)
    assert len(list((cache / "tokens").iterdir())) == 2
    assert not torch.equal(before.train.tokens, after.train.tokens)


def test_what_fails_keeps_nothing(folder: Path, cache: Path) -> None:
    write_jsonl(folder, DOCUMENTS)
    with (folder / "part.jsonl").open("a") as file:
        file.write("{")
    with pytest.raises(UserError, match="line 41 of"):
        large(folder)
    assert list((cache / "tokens").iterdir()) == []


def test_processes_that_begin_together_do_the_work_once(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    write_jsonl(folder, DOCUMENTS)
    begun: list[int] = []
    said: list[str] = []

    def number(*arguments, **rest):
        begun.append(1)
        give_up = time.monotonic() + 60
        while len(said) < 2 and time.monotonic() < give_up:  # until both others wait
            said.extend(capsys.readouterr().err.splitlines())
            time.sleep(0.01)
        return _number(*arguments, **rest)

    monkeypatch.setattr("equilibria.data.numbered_text._number", number)
    with ThreadPoolExecutor(3) as pool:  # each with a lock of its own on the same file, as processes have
        first, *others = pool.map(lambda _: large(folder), range(3))
    assert len(begun) == 1
    assert all(torch.equal(first.train.tokens, other.train.tokens) for other in others)
    assert said == ["waiting for another process that prepares the same text"] * 2


def test_a_full_disk_is_called_so(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_jsonl(folder, DOCUMENTS)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("equilibria.data.numbered_text._number", full)
    with pytest.raises(UserError, match=r"the disk of .*tokens is full; free some space \(equilibria data clear shows"):
        large(folder)
    assert list((cache / "tokens").iterdir()) == []


def test_a_long_test_split_is_not_shown_to_xz(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("equilibria.data.numbered_text.SHOWN", 100)
    write_jsonl(folder, DOCUMENTS)
    assert text_corpus(folder, options(), vocab_size=300).test_text is None
    corpus = large(folder)
    assert corpus.test_text is None
    assert corpus.test.bytes_per_token is not None


def test_the_tokenizer_is_read_by_hugging_face(folder: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    write_jsonl(folder, DOCUMENTS)
    tokenizer = text_corpus(folder, options(), vocab_size=300).tokenizer
    assert isinstance(tokenizer, BytePair)
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    assert theirs.eos_token == END
    assert theirs.eos_token_id == tokenizer.end_id
    assert theirs(DOCUMENTS[0])["input_ids"] == tokenizer.encode(DOCUMENTS[0])
    again = load_tokenizer(tmp_path)
    assert isinstance(again, BytePair)
    assert (again.end_of_text, again.size) == (END, tokenizer.size)
    assert [part.begins for part in whole("a", 0)] == [True]
