"""Fetching published data sets into the cache, and checking them there."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path

from equilibria.data.cache import FULL, cache_folder, new_folder
from equilibria.data.corpora import data_set_folder, find_files, published_corpus
from equilibria.data.download import FetchError, download, file_digest
from equilibria.data.published import DataSet, File
from equilibria.data.unpack import unpack
from equilibria.solution import UserError

Note = Callable[[str], None]


def get(data_set: DataSet, archive: Path | None = None, *, note: Note = lambda line: None) -> Path:
    """The folder of a data set in the cache, fetched if it is not there whole. Doing it again does nothing.

    `archive` is the archive as a user fetched it; otherwise it is looked for in the folder `downloads` of the cache, and
    fetched into it. Its checksum is that of the data set, or nothing is unpacked; so are those of the files, or nothing
    is kept. A folder of damaged files is replaced. `note` is told what happens.

    Raises UserError that says which file to fetch from where, and where to put it, if it cannot be had.
    """
    folder = data_set_folder(data_set.name)
    if folder.is_dir():
        damage = _damage(data_set, folder)
        if damage is None:
            note(f"{data_set.name} is in {folder}")
            return folder
        note(f"{damage}; it is made again")
    if archive is None:
        archive = _archive(data_set, note)
    elif not archive.is_file():
        raise UserError(f"there is no file {archive}; give the file that was fetched from {data_set.url}")
    elif (found := file_digest(archive, data_set.checksum)) != data_set.checksum:
        raise UserError(f"{archive} has the checksum {found}, not {data_set.checksum}; fetch {data_set.url} again")
    with new_folder(folder, replace=True) as scratch:
        unpack(archive, {file.member: scratch / file.name for file in data_set.files})
        if damage := _damage(data_set, scratch):
            raise UserError(f"{damage}, though its archive {archive} is the published one; nothing was kept")
    note(f"{data_set.name} is in {folder}")
    return folder


def verify(data_set: DataSet, data_dir: Path | None = None, *, note: Note = lambda line: None) -> None:
    """Checks the files of a data set, in `data_dir` or in the cache, and the tokens and the vocabulary they give.

    `note` is told what was found. Raises UserError for the first thing that is not as published.
    """
    for file, path in zip(data_set.files, find_files(data_set, data_dir), strict=True):
        if wrong := _wrong(file, path):
            raise UserError(f"{wrong}; get {data_set.url} again")
        basis = file.checksum.split(":")[0] if file.checksum else "no checksum is known"
        note(f"{path}: {path.stat().st_size:,} bytes ({basis})")
    corpus = published_corpus(data_set.name, data_dir)
    counts = tuple(len(split.tokens) for split in (corpus.train, corpus.valid, corpus.test))
    found = f"{' / '.join(f'{count:,}' for count in counts)} tokens, {corpus.tokenizer.size:,} symbols"
    if (counts, corpus.tokenizer.size) != (data_set.counts, data_set.vocabulary):
        published = f"{' / '.join(f'{count:,}' for count in data_set.counts)} and {data_set.vocabulary:,}"
        raise UserError(f"{data_set.name} has {found}, not {published}; get {data_set.url} again")
    note(f"{data_set.name}: {found}, as published")


def downloads_folder() -> Path:
    """Where archives are fetched to, and looked for."""
    return cache_folder() / "downloads"


def _archive(data_set: DataSet, note: Note) -> Path:
    path = downloads_folder() / data_set.archive
    if path.is_file():
        if file_digest(path, data_set.checksum) == data_set.checksum:
            return path
        note(f"{path} does not have the published checksum; it is fetched again")
    note(f"fetching {data_set.url} ({data_set.download})")
    try:
        download(data_set.url, path, data_set.checksum)
    except FetchError as error:
        raise UserError(
            f"cannot fetch {data_set.name} ({error}); fetch {data_set.url} by other means and put it into "
            f"{path.parent}, or name the file with --from, and run equilibria data get {data_set.name} again"
        ) from None
    except OSError as error:
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(cache_folder()).free
            note(f"{free:,} bytes are free in {cache_folder()}")
        full = error.errno in FULL
        remedy = "free some space (equilibria data clear shows what may go), or set" if full else "set"
        raise UserError(
            f"cannot write {path} ({error.strerror}); {remedy} the environment variable EQUILIBRIA_CACHE to a folder that "
            "can be written to"
        ) from None
    return path


def _damage(data_set: DataSet, folder: Path) -> str | None:
    """What is wrong with the files in a folder, if anything is."""
    return next((wrong for file in data_set.files if (wrong := _wrong(file, folder / file.name))), None)


def _wrong(file: File, path: Path) -> str | None:
    if not path.is_file():
        return f"{path} is missing"
    if file.size is not None and path.stat().st_size != file.size:
        return f"{path} has {path.stat().st_size:,} bytes, not {file.size:,}"
    if file.checksum is not None and (found := file_digest(path, file.checksum)) != file.checksum:
        return f"{path} has the checksum {found}, not {file.checksum}"
    return None
