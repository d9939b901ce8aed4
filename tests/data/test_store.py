from __future__ import annotations

import dataclasses
import hashlib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from misbehaving_server import Server, serve

from equilibria.data import download, store
from equilibria.data.published import DATA_SETS, PENN_TREEBANK, WIKITEXT_2, DataSet, File, find_data_set
from equilibria.data.store import get, verify
from equilibria.solution import UserError

CONTENTS = {"train": b"a b b\n" * 5000, "valid": b"a\n", "test": b"b a\n"}
NAMES = {split: f"wiki.{split}.tokens" for split in CONTENTS}


def sha256(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    path = tmp_path / "by-hand.zip"
    with zipfile.ZipFile(path, "w") as file:
        for split, content in CONTENTS.items():
            file.writestr(f"folder/wiki.{split}.tokens", content)
    return path


@pytest.fixture
def server(archive: Path) -> Iterator[Server]:
    with serve(archive.read_bytes()) as server:
        yield server


@pytest.fixture
def data_set(server: Server, archive: Path) -> DataSet:
    """WikiText-2 in small, on the server."""
    return dataclasses.replace(
        WIKITEXT_2,
        url=server.url,
        checksum=sha256(archive.read_bytes()),
        files=tuple(
            File(
                name=f"wiki.{split}.tokens",
                member=f"folder/wiki.{split}.tokens",
                size=len(content),
                checksum=sha256(content),
            )
            for split, content in CONTENTS.items()
        ),
        counts=(20_000, 2, 3),
        vocabulary=3,
    )


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EQUILIBRIA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(store, "download", lambda *args: download.download(*args, wait=lambda seconds: None))
    return tmp_path / "cache"


def is_whole(folder: Path) -> bool:
    return {path.name: path.read_bytes() for path in folder.iterdir()} == {NAMES[key]: CONTENTS[key] for key in NAMES}


def test_get_fetches_once(data_set: DataSet, server: Server, cache: Path) -> None:
    folder = get(data_set)
    assert folder == cache / "data" / "wikitext-2"
    assert is_whole(folder)
    notes: list[str] = []
    assert get(data_set, note=notes.append) == folder
    assert len(server.asked) == 1
    assert notes == [f"wikitext-2 is in {folder}"]
    lines: list[str] = []
    verify(data_set, note=lines.append)
    assert lines[0] == f"{folder / 'wiki.train.tokens'}: 30,000 bytes (sha256)"
    assert lines[-1] == "wikitext-2: 20,000 / 2 / 3 tokens, 3 symbols, as published"


def test_get_survives_a_bad_connection(data_set: DataSet, server: Server) -> None:
    server.cuts = [100, 1000]
    server.statuses = [500, 200, 503]
    assert is_whole(get(data_set))


def test_what_cannot_be_fetched_is_said_in_one_line_with_what_to_do(
    data_set: DataSet, server: Server, archive: Path, cache: Path
) -> None:
    server.statuses = [404]
    with pytest.raises(UserError) as error:
        get(data_set)
    message = str(error.value)
    assert "\n" not in message
    for part in ("404", server.url, str(cache / "downloads"), "--from", "equilibria data get wikitext-2"):
        assert part in message
    assert not (cache / "data").exists()
    archive.rename(cache / "downloads" / "data.zip")  # what the message says
    assert is_whole(get(data_set))
    assert len(server.asked) == 1


def test_an_archive_given_by_hand(data_set: DataSet, server: Server, archive: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"there is no file {tmp_path}/absent; give the file .*{server.url}"):
        get(data_set, tmp_path / "absent")
    (tmp_path / "other").write_bytes(b"other")
    with pytest.raises(UserError, match=r"other has the checksum sha256:.*, not sha256:.*; fetch http.* again"):
        get(data_set, tmp_path / "other")
    assert is_whole(get(data_set, archive))
    assert archive.is_file()
    assert server.asked == []


def test_wrong_bytes_are_never_unpacked(data_set: DataSet, server: Server, cache: Path) -> None:
    server.content = server.content[:-1] + b"x"
    with pytest.raises(UserError, match="does not have the checksum"):
        get(data_set)
    assert list(cache.rglob("*")) == [cache / "downloads"]


def test_an_interrupted_get_leaves_no_folder(data_set: DataSet, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(archive: Path, members: dict[str, Path]) -> None:
        next(iter(members.values())).write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(store, "unpack", interrupted)
        with pytest.raises(KeyboardInterrupt):
            get(data_set)
    assert list((cache / "data").iterdir()) == []
    assert is_whole(get(data_set))


def test_files_other_than_published_are_not_kept(data_set: DataSet, cache: Path) -> None:
    wrong = dataclasses.replace(data_set.files[0], checksum=sha256(b""))
    with pytest.raises(UserError, match=r"train\.tokens has the checksum .*nothing was kept"):
        get(dataclasses.replace(data_set, files=(wrong, *data_set.files[1:])))
    assert list((cache / "data").iterdir()) == []


def test_a_damaged_folder_is_found_and_replaced(data_set: DataSet) -> None:
    folder = get(data_set)
    path = folder / NAMES["valid"]
    for content, wrong in [(b"b\n", "has the checksum sha256:"), (b"longer\n", "has 7 bytes, not 2")]:
        path.write_bytes(content)
        with pytest.raises(UserError, match=wrong):
            verify(data_set)
        notes: list[str] = []
        get(data_set, note=notes.append)
        assert wrong in notes[0]
        assert is_whole(folder)


def test_verify_counts(data_set: DataSet, tmp_path: Path) -> None:
    get(data_set)
    with pytest.raises(UserError, match="has 20,000 / 2 / 3 tokens, 3 symbols, not 20,000 / 2 / 3 and 4; get http"):
        verify(dataclasses.replace(data_set, vocabulary=4))
    with pytest.raises(UserError, match="there is no wiki"):
        verify(data_set, tmp_path)


@pytest.mark.parametrize("data_set", [WIKITEXT_2, PENN_TREEBANK], ids=lambda data_set: data_set.name)
def test_the_real_files_are_the_published_ones(data_set: DataSet, shared_data: Path) -> None:
    verify(data_set, shared_data)


def test_the_characters_of_the_penn_treebank_are_those_of_its_words(shared_data: Path, tmp_path: Path) -> None:
    """The files of the character level are made as Mikolov describes them, and give the counts that are published here."""
    for split in ("train", "valid", "test"):
        words = (shared_data / "penn-treebank" / f"ptb.{split}.txt").read_text().removesuffix("\n").split("\n")
        lines = (" ".join("_".join(line.split())) for line in words)
        (tmp_path / f"ptb.char.{split}.txt").write_text("".join(f" {line} \n" for line in lines))
    verify(find_data_set("penn-treebank-char"), tmp_path)


def test_the_list_is_sound() -> None:
    for data_set in DATA_SETS.values():
        assert data_set.url.startswith("http")
        assert data_set.archive.endswith((".zip", ".tgz"))
        lengths = {"sha256": 64, "sha1": 40, "md5": 32}
        for checksum in (data_set.checksum, *(file.checksum for file in data_set.files if file.checksum)):
            algorithm, digits = checksum.split(":")
            assert len(digits) == lengths[algorithm]
            assert int(digits, 16) > 0
    with pytest.raises(UserError, match="no data set 'ptb'; choose wikitext-103, "):
        find_data_set("ptb")
