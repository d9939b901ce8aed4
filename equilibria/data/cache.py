"""The folder where data sets, and texts as numbers, are kept between runs."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from equilibria.data.tokenizer import load_tokenizer
from equilibria.data.vocabulary import Vocabulary
from equilibria.data.word_ids import IDS, WordStyle, in_memory, number_words
from equilibria.solution import UserError

LARGE = 1 << 26  # bytes of text; below, numbering the words anew takes a second or two
DAY = 86_400.0  # seconds
FORMAT = 1  # of a folder of numbered words
NAMES = ("train.int32", "valid.int32", "test.int32")


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
    Raises UserError where the cache cannot be written.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for stale in target.parent.glob(f".{target.name}-*"):
            if stale.stat().st_mtime < time.time() - DAY:
                shutil.rmtree(stale, ignore_errors=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise UserError(
            f"cannot write to {target.parent} ({error.strerror}); set the environment variable EQUILIBRIA_CACHE to a "
            "folder that can be written to"
        ) from None
    try:
        yield scratch
        scratch.chmod(0o755)  # a temporary folder is closed to others, a cache may be shared
        if replace:
            shutil.rmtree(target, ignore_errors=True)
        try:
            scratch.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def numbered_words(paths: Sequence[Path], style: WordStyle, *, large: int = LARGE) -> tuple[list[Tensor], Vocabulary]:
    """The tokens of three files of words, train first, and their vocabulary.

    Texts of `large` bytes and more are numbered once. Their ids, int32, are kept in the cache folder under the SHA-256
    of the files' contents and of the style, so that a text that changed in any way is numbered anew, and are read from
    there as they are needed (memory-mapped); the SHA-256 takes a second or so. Other texts give int64 in memory.
    """
    if sum(path.stat().st_size for path in paths) < large:
        outs = in_memory()
        vocabulary = number_words(paths, style, outs)
        return [_tensor(out.getbuffer()).to(torch.int64) for out in outs], vocabulary  # pyright: ignore
    folder = cache_folder() / "words" / _key(paths, style)
    if not folder.is_dir():
        with new_folder(folder) as scratch, contextlib.ExitStack() as stack:
            outs = [stack.enter_context((scratch / name).open("w+b")) for name in NAMES]
            bar = stack.enter_context(_bar(paths))
            vocabulary = number_words(paths, style, outs, bar.update)
            vocabulary.save(scratch)
            sizes = {name: out.seek(0, os.SEEK_END) for name, out in zip(NAMES, outs, strict=True)}
            (scratch / "sizes.json").write_text(json.dumps(sizes))
    return _read(folder)


def _bar(paths: Sequence[Path]) -> tqdm:
    """Shown on a terminal only."""
    size = sum(path.stat().st_size for path in paths)
    return tqdm(total=size, unit="B", unit_scale=True, desc="numbering the words, once", disable=None)


def _read(folder: Path) -> tuple[list[Tensor], Vocabulary]:
    damaged = UserError(f"the kept text in {folder} is damaged; delete that folder, and it will be made again")
    try:
        vocabulary = load_tokenizer(folder)
        sizes = json.loads((folder / "sizes.json").read_text())
        whole = all((folder / name).stat().st_size == sizes[name] for name in NAMES)
    except (OSError, ValueError, KeyError, TypeError, UserError):
        raise damaged from None
    if not whole or not isinstance(vocabulary, Vocabulary):
        raise damaged
    return [
        # A private map: pages are read when they are needed, and writing to them would not reach the file.
        torch.from_file(str(folder / name), shared=False, size=sizes[name] // IDS.itemsize, dtype=torch.int32)
        for name in NAMES
    ], vocabulary


def _key(paths: Sequence[Path], style: WordStyle) -> str:
    digest = hashlib.sha256(json.dumps([FORMAT, asdict(style)]).encode())
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _tensor(ids: memoryview) -> Tensor:
    return torch.frombuffer(ids, dtype=torch.int32) if len(ids) else torch.empty(0, dtype=torch.int32)
