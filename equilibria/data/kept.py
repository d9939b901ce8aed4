"""What is kept in the cache, and throwing it away."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from equilibria.data.cache import DIGESTS, cache_folder
from equilibria.data.published import DATA_SETS


@dataclass(frozen=True)
class Kept:
    """Something in the cache."""

    path: Path
    what: str
    used: float
    """When it was last used, in seconds since 1970; of an archive, when it was fetched."""

    @property
    def size(self) -> int:
        """Bytes on the disk."""
        files = self.path.rglob("*") if self.path.is_dir() else [self.path]
        return sum(file.lstat().st_size for file in files if not file.is_dir())

    def remove(self) -> None:
        """Deletes it; a link is deleted and not followed."""
        if self.path.is_dir() and not self.path.is_symlink():
            shutil.rmtree(self.path)
        else:
            self.path.unlink()


def kept_things(*, data_sets: bool = False) -> list[Kept]:
    """Texts as tokens, what killed processes left of such, and archives; with `data_sets` also the data sets themselves.

    The longest unused comes first. Nothing is listed that this library did not put there, though the cache may be a folder
    with other things in it.
    """
    things = [*_texts("tokens"), *_texts("words"), *_archives()]
    if data_sets:
        folder = cache_folder() / "data"
        places = (folder / name for name in DATA_SETS)
        things += [Kept(path, "data set", _used(path)) for path in places if path.is_dir()]
    return sorted(things, key=lambda kept: kept.used)


def _texts(kind: str) -> Iterator[Kept]:
    folder = cache_folder() / kind
    for path in folder.iterdir() if folder.is_dir() else ():
        if re.fullmatch(r"[0-9a-f]{64}", path.name) and (path / DIGESTS).is_file():
            yield Kept(path, f"text as {kind}", _used(path))
        elif re.fullmatch(r"\.[0-9a-f]{64}-\w+", path.name) and path.is_dir():
            yield Kept(path, "unfinished", _used(path))


def _archives() -> Iterator[Kept]:
    names = {data_set.archive for data_set in DATA_SETS.values()}
    folder = cache_folder() / "downloads"
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name in names:
            yield Kept(path, "archive", _used(path))
        elif any(path.name.startswith(f"{name}.") for name in names) and path.is_file():
            yield Kept(path, "unfinished", _used(path))


def _used(path: Path) -> float:
    return path.lstat().st_mtime
