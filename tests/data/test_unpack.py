from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path

import pytest

from equilibria.data.unpack import unpack
from equilibria.solution import UserError


def make_zip(path: Path, contents: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    return path


def make_tar(path: Path, contents: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize("make", [make_zip, make_tar])
@pytest.mark.parametrize("prefix", ["", "./"])
def test_only_what_is_named_is_taken_out_and_to_where_it_is_named(make, prefix: str, tmp_path: Path) -> None:
    contents = {"a/one.txt": b"1" * 300_000, "a/two.txt": b"2", "../outside": b"3", "/tmp/equilibria-outside": b"4"}
    archive = make(tmp_path / "archive", {f"{prefix}{name}": content for name, content in contents.items()})
    out = tmp_path / "deep" / "out"
    out.mkdir(parents=True)
    unpack(archive, {"a/one.txt": out / "x", "a/two.txt": out / "y"})
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {"x": b"1" * 300_000, "y": b"2"}
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert not Path("/tmp/equilibria-outside").exists()


@pytest.mark.parametrize("make", [make_zip, make_tar])
def test_a_member_that_is_missing_is_named(make, tmp_path: Path) -> None:
    archive = make(tmp_path / "archive", {"a": b"1", "folder/b": b"2"})
    with pytest.raises(UserError, match=r"archive has no b, c; give the archive as it was fetched"):
        unpack(archive, {"a": tmp_path / "a", "b": tmp_path / "b", "c": tmp_path / "c"})


def test_a_link_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    with tarfile.open(tmp_path / "archive", "w") as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            info = tarfile.TarInfo("a")
            info.type, info.linkname = kind, str(tmp_path / "secret")
            archive.addfile(info)
    with pytest.raises(UserError, match="has no a"):
        unpack(tmp_path / "archive", {"a": tmp_path / "a"})
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("content", [b"", b"no archive" * 100])
def test_a_file_that_is_no_archive_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "archive").write_bytes(content)
    with pytest.raises(UserError, match=r"archive (is neither a zip nor a tar archive|has no a)"):
        unpack(tmp_path / "archive", {"a": tmp_path / "a"})


def test_a_damaged_archive_is_named(tmp_path: Path) -> None:
    """A changed byte of a zip archive, which has checksums, and an end missing of a compressed tar archive."""
    contents = {"a": bytes(i * i % 251 for i in range(100_000)), "b": b"2"}
    changed = bytearray(make_zip(tmp_path / "zip", contents).read_bytes())
    changed[len(changed) // 3] ^= 255
    cut = make_tar(tmp_path / "tar", contents).read_bytes()[:-40]
    for damaged in (bytes(changed), cut):
        (tmp_path / "archive").write_bytes(damaged)
        with pytest.raises(UserError, match=r"archive is damaged \(.*\); fetch it again"):
            unpack(tmp_path / "archive", {"a": tmp_path / "a", "b": tmp_path / "b"})
