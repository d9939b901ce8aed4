"""The folder where data sets, and texts as numbers, are kept between runs."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from torch import Tensor
from tqdm import tqdm

from equilibria.data.disk import sha256, sync
from equilibria.data.tokenizer import load_tokenizer
from equilibria.data.vocabulary import Vocabulary
from equilibria.data.word_ids import IDS, WordStyle, in_memory, number_words
from equilibria.solution import UserError

LARGE = 1 << 26  # bytes of text; below, numbering the words anew takes a second or two
DAY = 86_400.0  # seconds
FORMAT = 2  # of a folder of numbered words
NAMES = ("train.int32", "valid.int32", "test.int32")
TOKENIZER = "tokenizer.json"
FULL = (errno.ENOSPC, errno.EDQUOT)  # no space left, or none that is ours
DIGESTS = "sha256.json"  # of the other files in that folder


def cache_folder() -> Path:
    """The folder of everything that is kept, which need not exist.

    EQUILIBRIA_CACHE if that is set; else `equilibria` in XDG_CACHE_HOME, or in ~/.cache.

    >>> cache_folder().is_absolute()
    True
    """
    if own := os.environ.get("EQUILIBRIA_CACHE"):
        return Path(own).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification has relative paths ignored.
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "equilibria"


@contextlib.contextmanager
def new_folder(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """A folder to fill that becomes `target` at the end of the block, whole, and disappears if that raises.

    A process that is killed leaves a hidden folder beside `target`, which a later call deletes after a day.
    With `replace`, a `target` that is there is deleted; otherwise it stays, as when another process made it meanwhile.
    Raises UserError where the cache cannot be written, or the disk becomes full meanwhile.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for stale in target.parent.glob(f".{target.name}-*"):
            if stale.stat().st_mtime < time.time() - DAY:
                shutil.rmtree(stale, ignore_errors=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise _cannot_write(target.parent, error) from None
    try:
        yield scratch
        scratch.chmod(0o755)  # a temporary folder is closed to others, a cache may be shared
        # Otherwise a machine that loses power after the rename could leave a folder of empty files.
        for path in (*scratch.rglob("*"), scratch):
            sync(path)
        if replace:
            shutil.rmtree(target, ignore_errors=True)
        try:
            scratch.rename(target)
        except OSError:
            if not target.is_dir():
                raise
        sync(target.parent)
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise UserError(
            f"the disk of {target.parent} is full; free some space (equilibria data clear shows what may go), or set the "
            "environment variable EQUILIBRIA_CACHE to a folder on another disk"
        ) from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _cannot_write(place: Path, error: OSError) -> UserError:
    return UserError(
        f"cannot write to {place} ({error.strerror}); set the environment variable EQUILIBRIA_CACHE to a folder that can "
        "be written to"
    )


def numbered_words(paths: Sequence[Path], style: WordStyle, *, large: int = LARGE) -> tuple[list[Tensor], Vocabulary]:
    """The tokens of three files of words, train first, and their vocabulary.

    Texts of `large` bytes and more are numbered once. Their ids, int32, are kept in the cache folder under the SHA-256
    of the files' contents and of the style, so that a text that changed in any way is numbered anew, and are read from
    there as they are needed (memory-mapped). What is kept has SHA-256s of its own: a file that is not as it was written
    has the text numbered again, with a line on stderr. Text and ids together take a second or so to check. Other texts
    give int64 in memory.
    """
    if sum(path.stat().st_size for path in paths) < large:
        outs = in_memory()
        vocabulary = number_words(paths, style, outs)
        return [as_tensor(out.getbuffer()).to(torch.int64) for out in outs], vocabulary  # pyright: ignore

    def fill(scratch: Path) -> None:
        with contextlib.ExitStack() as stack:
            outs = [stack.enter_context((scratch / name).open("w+b")) for name in NAMES]
            bar = stack.enter_context(progress_bar("numbering the words, once", sum(path.stat().st_size for path in paths)))
            number_words(paths, style, outs, bar.update).save(scratch)

    folder = kept_folder("words", _key(paths, style), fill, "its words are numbered again")
    vocabulary = load_tokenizer(folder)
    assert isinstance(vocabulary, Vocabulary)
    return kept_tokens(folder), vocabulary


def kept_folder(kind: str, key: str, fill: Callable[[Path], None], remedy: str) -> Path:
    """The folder `kind`/`key` of the cache, whole: `fill` is called with an empty folder where there is none.

    The SHA-256 of every file is kept with it. Where one is not as it was written, the folder is filled again, with a line
    on stderr that ends in `remedy`. Of several processes that begin together one fills it, and the others wait. Its time of
    change is that of its last use, by which `equilibria data clear` goes.
    """
    folder = cache_folder() / kind / key
    if not _whole(folder):
        with _alone(key):
            there = folder.is_dir()
            if not there or not _whole(folder):  # as another process may have left it meanwhile
                if there:
                    print(f"the kept text in {folder} is damaged; {remedy}", file=sys.stderr, flush=True)
                with new_folder(folder, replace=there) as scratch:
                    fill(scratch)
                    (scratch / DIGESTS).write_text(json.dumps({path.name: sha256(path) for path in scratch.iterdir()}))
    with contextlib.suppress(OSError):  # a cache may be shared, and closed to writing
        os.utime(folder)
    return folder


def kept_tokens(folder: Path) -> list[Tensor]:
    """The three files of tokens in a folder, int32, read from there as they are needed (memory-mapped)."""
    tokens: list[Tensor] = []
    for name in NAMES:
        path = folder / name
        size = path.stat().st_size // IDS.itemsize
        # A private map: pages are read when they are needed, and writing to them would not reach the file.
        tokens.append(torch.from_file(str(path), shared=False, size=size, dtype=torch.int32))
    return tokens


def progress_bar(what: str, size: int | None) -> tqdm:
    """Of bytes; shown on a terminal only."""
    return tqdm(total=size, unit="B", unit_scale=True, desc=what, disable=None)


@contextlib.contextmanager
def _alone(key: str) -> Iterator[None]:
    """No two processes are in such a block with the same key. The lock goes with the process, however it ends."""
    place = cache_folder() / "locks"
    try:
        place.mkdir(parents=True, exist_ok=True)
        lock = FileLock(place / key)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            print("waiting for another process that prepares the same text", file=sys.stderr, flush=True)
            lock.acquire()
    except OSError as error:
        raise _cannot_write(place, error) from None
    try:
        yield
    finally:
        lock.release()


def _whole(folder: Path) -> bool:
    """Every file is as it was written."""
    try:
        digests = json.loads((folder / DIGESTS).read_text())
        return {TOKENIZER, *NAMES} <= digests.keys() and all(sha256(folder / name) == digests[name] for name in digests)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _key(paths: Sequence[Path], style: WordStyle) -> str:
    digest = hashlib.sha256(json.dumps([FORMAT, asdict(style)]).encode())
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def as_tensor(ids: memoryview) -> Tensor:
    """(N,) int32: ids that were written to memory."""
    return torch.frombuffer(ids, dtype=torch.int32) if len(ids) else torch.empty(0, dtype=torch.int32)
