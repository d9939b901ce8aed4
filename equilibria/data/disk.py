"""Files and folders that are on the disk whole or not at all, and are known to be those that were written."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from equilibria.solution import UserError


def sync(path: Path) -> None:
    """Force a file, or a folder's entries, to the disk.

    >>> sync(Path.cwd())
    """
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no folders
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    """The SHA-256 of a file, hexadecimal, read piece by piece."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_full(error: OSError) -> bool:
    """Whether there was no room: the disk is full, or the quota of the user or the largest size of a file is reached."""
    return error.errno in (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", None))  # Windows has no quota


def make_folder(path: Path) -> None:
    """Make a folder and those above it, as far as they are missing, so that they outlive a power cut."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync(path.parent)


def refuse_existing(path: Path) -> None:
    """Raise UserError if there is something of that name, be it a link that leads nowhere."""
    if path.exists() or path.is_symlink():
        raise UserError(f"{path} exists already; give the name of a new folder")


def write_text(path: Path, text: str) -> None:
    """Write a file, whole or not at all."""
    fresh = path.with_name(path.name + ".new")
    try:
        fresh.write_text(text, encoding="utf-8")
        sync(fresh)
        fresh.replace(path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_json(path: Path, values: Any) -> None:
    """Write a JSON file, whole or not at all."""
    write_text(path, json.dumps(values, indent=2, allow_nan=False) + "\n")


def write_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Replace the folder `target` by what `fill(folder)` writes, so that a kill at any moment leaves a whole one.

    A folder cannot be renamed over another, so the old one steps aside first; `settle_folder` puts it back should the
    process die between the two renames, and until then `present` finds it. Where `fill` raises, the old one stays and
    nothing of the new.
    """
    settle_folder(target)
    make_folder(target.parent)
    fresh, old = _beside(target, "new"), _beside(target, "old")
    try:
        fresh.mkdir()
        fill(fresh)
        for path in (*fresh.rglob("*"), fresh):
            sync(path)
        if target.exists():
            target.rename(old)
        fresh.rename(target)
    except BaseException:
        settle_folder(target)
        raise
    sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def remove_folder(target: Path) -> None:
    """Remove a folder; a kill on the way leaves nothing of it under its name."""
    gone = _beside(target, "gone")
    target.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def settle_folder(target: Path) -> None:
    """Clear away what a killed `write_folder` or `remove_folder` left, keeping the last whole version.

    For the process that writes the folder: it would take the scratch from another that is writing.
    """
    old = _beside(target, "old")
    if old.exists() and not target.exists():
        old.rename(target)
    for suffix in ("old", "new", "gone"):
        shutil.rmtree(_beside(target, suffix), ignore_errors=True)


def settle_folders(parent: Path) -> None:
    """`settle_folder` for every folder in `parent`, also those of which there is only scratch."""
    scratch = [path for suffix in ("old", "new", "gone") for path in parent.glob(f".*.{suffix}")]
    for path in scratch:
        settle_folder(path.with_name(path.stem.removeprefix(".")))


def present(target: Path) -> Path:
    """Where the last whole version of `target` is: beside it, while another process is replacing it or died doing so."""
    old = _beside(target, "old")
    return old if old.exists() and not target.exists() else target


def _beside(target: Path, suffix: str) -> Path:
    return target.with_name(f".{target.name}.{suffix}")
