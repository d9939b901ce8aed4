"""Taking named files out of an archive."""

from __future__ import annotations

import posixpath
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

from equilibria.solution import UserError


def unpack(archive: Path, members: Mapping[str, Path]) -> None:
    """Writes the files `members` (their path in the archive: where to) of a zip or tar archive, compressed or not.

    Nothing else is taken out and no path in the archive is ever used as one outside, so that an archive can write
    nowhere but to the places given; a link is no file. Raises UserError for a file that is no such archive, is damaged
    or lacks one of the members.

        unpack(Path("enwik8.zip"), {"enwik8": Path("data/enwik8")})
    """
    try:
        if zipfile.is_zipfile(archive):
            _unpack_zip(archive, dict(members))
        elif tarfile.is_tarfile(archive):
            _unpack_tar(archive, dict(members))
        else:
            raise UserError(f"{archive} is neither a zip nor a tar archive; give the archive as it was fetched")
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError) as error:
        raise UserError(f"{archive} is damaged ({error}); fetch it again") from None


def _unpack_zip(archive: Path, wanted: dict[str, Path]) -> None:
    with zipfile.ZipFile(archive) as source:
        for info in source.infolist():
            target = None if info.is_dir() else wanted.pop(posixpath.normpath(info.filename), None)
            if target is not None:
                with source.open(info) as inner, target.open("wb") as file:
                    shutil.copyfileobj(inner, file)
    _require_none(archive, wanted)


def _unpack_tar(archive: Path, wanted: dict[str, Path]) -> None:
    with tarfile.open(archive) as source:
        for info in source:
            target = wanted.pop(posixpath.normpath(info.name), None) if info.isreg() else None
            inner = None if target is None else source.extractfile(info)
            if target is not None and inner is not None:
                with inner, target.open("wb") as file:
                    shutil.copyfileobj(inner, file)
    _require_none(archive, wanted)


def _require_none(archive: Path, missing: Mapping[str, Path]) -> None:
    if missing:
        raise UserError(f"{archive} has no {', '.join(missing)}; give the archive as it was fetched")
