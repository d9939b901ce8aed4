"""A folder of text files as the three splits of a corpus."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from equilibria.data.disk import sha256
from equilibria.data.documents import SUFFIXES, Advance, Document, file_documents
from equilibria.solution import UserError

SPLITS = ("train", "valid", "test")
# At the beginning of the name of a file or folder, alone or followed by what is no letter: train.txt, val-00001.jsonl.
NAMED = re.compile(r"(?:(train|training)|(valid|validation|val|dev)|(test|testing))(?![^\W\d_])", re.IGNORECASE)


@dataclass(frozen=True)
class TextFiles:
    """The files of a text, by split, in their natural order. Made by `find_text_files`."""

    folder: Path
    field: str
    files: tuple[tuple[Path, ...], ...]
    """Of train, valid and test."""
    digests: tuple[tuple[str, ...], ...]
    """SHA-256 of each file."""
    notes: tuple[str, ...] = ()
    """What is worth saying of them."""

    def has(self, split: int) -> bool:
        """Whether there are files of train (0), valid (1) or test (2)."""
        return bool(self.files[split])

    def documents(self, split: int, advance: Advance = lambda size: None) -> Iterator[Document]:
        """The documents of the files of a split. Raises UserError for a file that cannot be read."""
        for path in self.files[split]:
            yield from file_documents(path, self.field, advance)

    def size(self) -> int:
        """Bytes of all files as they are on the disk."""
        return sum(path.stat().st_size for paths in self.files for path in paths)

    def key(self) -> object:
        """What decides the documents: the contents of the files, not where they are."""
        kinds = [[path.name.lower().removesuffix(".gz").rsplit(".", 1)[1] for path in paths] for paths in self.files]
        return [self.field, kinds, self.digests]

    def where(self, split: int) -> str:
        """Words for a split."""
        files = self.files[split]
        return str(files[0]) if len(files) == 1 else f"the {SPLITS[split]} split of {self.folder}"


def find_text_files(place: Path, field: str = "text") -> TextFiles:
    """The text files in a folder and its folders, or the one file `place`.

    They end in .txt, .jsonl or .parquet, the first two also with .gz. Hidden files are left out, and so is a file whose
    content another one of its split has. If the name of a file, or of a folder it is in, begins with train, valid, val, dev
    or test, it is of that split; then files without such a name are left out. If none does, all are of train.
    Raises UserError if there is no text, or none for train.
    """
    if not place.exists():
        raise UserError(f"{place} does not exist; name a folder of text files: {', '.join(SUFFIXES)}")
    if place.is_file():
        if not place.name.lower().endswith(SUFFIXES):
            raise UserError(f"{place} is no text file; give one that ends in {', '.join(SUFFIXES)}, or a folder of them")
        found, others, splits = [place], 0, [[place], [], []]
    else:
        found, others = _walk(place)
        if not found:
            raise _nothing(place, others)
        splits = _by_name(place, found)
    notes = []
    if others:
        notes.append(f"{_count(others, 'file')} of other kinds left out")
    if unnamed := len(found) - sum(map(len, splits)):
        first = next(path for path in found if not any(path in paths for paths in splits))
        notes.append(f"{_count(unnamed, 'file')} left out, for only others are named train, valid or test: {first} ...")
    kept, digests, more = _without_doubles(splits)
    return TextFiles(place, field, kept, digests, (*notes, *more))


def _walk(folder: Path) -> tuple[list[Path], int]:
    """Text files in a natural order, in which part-2 comes before part-10, and the number of other files."""

    def fail(error: OSError) -> None:
        raise UserError(f"cannot read {error.filename} ({error.strerror}); change its permissions") from None

    found: list[Path] = []
    others, seen = 0, set()
    for place, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        if (real := os.path.realpath(place)) in seen:  # a link to a folder above would lead round for ever
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (Path(place, name) for name in names if not name.startswith(".")):
            if path.name.lower().endswith(SUFFIXES) and path.is_file():
                found.append(path)
            else:
                others += 1
    return sorted(found, key=lambda path: [_natural(part) for part in path.relative_to(folder).parts]), others


def _natural(name: str) -> tuple[list[tuple[str, int]], str]:
    """What to sort a name by: numbers count as numbers."""
    return [(text.casefold(), int(digits or 0)) for text, digits in re.findall(r"(\D*)(\d*)", name)], name


def _by_name(folder: Path, found: list[Path]) -> list[list[Path]]:
    splits: list[list[Path]] = [[], [], []]
    for path in found:
        match = next((match for part in path.relative_to(folder).parts if (match := NAMED.match(part))), None)
        if match:
            splits[(match.lastindex or 1) - 1].append(path)
    if not any(splits):
        return [found, [], []]
    if not splits[0]:
        odd = next(path for paths in splits for path in paths)
        raise UserError(
            f"{odd} is named as if it were to validate or test on, but nothing in {folder} is named train; rename the "
            "files to train on so that they begin with train, or put them into a folder train"
        )
    return splits


def _without_doubles(
    splits: list[list[Path]],
) -> tuple[tuple[tuple[Path, ...], ...], tuple[tuple[str, ...], ...], list[str]]:
    kept: list[dict[str, Path]] = [{}, {}, {}]
    doubles: list[Path] = []
    for mine, paths in zip(kept, splits, strict=True):
        for path in paths:
            digest = sha256(path)
            if digest in mine:
                doubles.append(path)
            mine.setdefault(digest, path)
    notes = []
    if doubles:
        notes.append(f"{_count(len(doubles), 'file')} left out as equal to others: {doubles[0]} ...")
    for first, second in ((0, 1), (0, 2), (1, 2)):
        if same := kept[first].keys() & kept[second].keys():
            path = kept[second][min(same)]
            notes.append(f"warning: {path} is in {SPLITS[first]} as well, so that its figures tell of nothing new")
    return tuple(tuple(each.values()) for each in kept), tuple(tuple(each) for each in kept), notes


def _nothing(folder: Path, others: int) -> UserError:
    if any((folder / name).is_file() for name in ("dataset_dict.json", "dataset_info.json")):
        return UserError(f"{folder} is a data set that the library datasets saved; name it with --dataset {folder}")
    return UserError(
        f"there is no text in {folder}: none of its {others} files ends in {', '.join(SUFFIXES)}; give another"
    )


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
