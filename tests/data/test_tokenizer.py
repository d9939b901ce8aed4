from __future__ import annotations

from pathlib import Path

import pytest

from equilibria.data import BytePair, Bytes, Tokenizer, Vocabulary, load_tokenizer
from equilibria.solution import UserError


def test_the_kind_tells_which_tokenizer_it_is() -> None:
    made: list[Tokenizer] = [Vocabulary(["<eos>"]), BytePair.train("text", 256), Bytes()]
    assert [tokenizer.kind for tokenizer in made] == ["words", "byte-pair", "bytes"]


def test_the_tokenizer_saved_last_is_the_one_loaded(tmp_path: Path) -> None:
    BytePair.train("text", 256).save(tmp_path)
    Vocabulary(["<eos>", "a"]).save(tmp_path)
    assert load_tokenizer(tmp_path).kind == "words"
    BytePair.train("text", 256).save(tmp_path)
    assert load_tokenizer(tmp_path).kind == "byte-pair"


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read .*tokenizer\.json \(No such file"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"{}",
        b'{"kind": "words"}',
        b'{"kind": "bytes"}',
        b'{"kind": "bytes", "alphabet": [1, 1]}',
        b'{"kind": "bytes", "alphabet": [256]}',
        b'{"kind": "bytes", "alphabet": "ab"}',
        b'{"kind": "words", "words": [1]}',
        b'{"kind": "words", "words": ["a", "a"]}',
        b'{"kind": "words", "words": ["a"], "end_of_line": 0}',
        b'{"model": {"type": "no such model"}}',
    ],
)
def test_a_file_that_is_not_a_tokenizer_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(UserError, match=r"tokenizer\.json is not") as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)
