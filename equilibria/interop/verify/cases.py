"""Recorded cases on disk: where they are, whether they are whole, what is in them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from equilibria.interop.verify.tolerances import DEFAULTS, Limits, read_tolerances
from equilibria.solution import UserError

MANIFEST = "MANIFEST.json"


class Recorded(Mapping[str, Tensor]):
    """The tensors of one file, floating ones in the precision of the run; it remembers which were looked at."""

    def __init__(self, tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> None:
        self._tensors = tensors
        self._dtype = dtype
        self.seen: set[str] = set()

    def __getitem__(self, key: str) -> Tensor:
        tensor = self._tensors[key]
        self.seen.add(key)
        return tensor.to(self._dtype) if self._dtype is not None and tensor.is_floating_point() else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, key: object) -> bool:
        return key in self._tensors  # without looking at it

    def under(self, prefix: str) -> Recorded:
        """Those whose names begin so, without that."""
        return _Part(self, prefix)


class _Part(Recorded):
    def __init__(self, whole: Recorded, prefix: str) -> None:
        self._whole, self._prefix = whole, prefix
        self._names = {key.removeprefix(prefix): key for key in whole if key.startswith(prefix)}

    def __getitem__(self, key: str) -> Tensor:
        return self._whole[self._names[key]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, key: object) -> bool:
        return key in self._names


@dataclass
class Case:
    """A folder with config.json and tensors, and what a manifest says of it."""

    folder: Path
    entry: Mapping[str, Any] | None
    """Of the manifest; None without one."""
    tolerances: Mapping[str, Limits]
    opened: dict[tuple[str, torch.dtype | None], Recorded] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.folder.name

    @cached_property
    def config(self) -> dict[str, Any]:
        config = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise UserError(f"{self.folder / 'config.json'} holds no object")
        return config

    def has(self, file: str) -> bool:
        return (self.folder / file).is_file()

    def json(self, file: str) -> dict[str, Any]:
        return json.loads((self.folder / file).read_text(encoding="utf-8"))

    def tensors(self, file: str, dtype: torch.dtype | None = None) -> Recorded:
        """Of a file of tensors, given without .safetensors; as recorded where no dtype is given."""
        from safetensors.torch import load_file

        if (file, dtype) not in self.opened:
            self.opened[file, dtype] = Recorded(load_file(self.folder / f"{file}.safetensors"), dtype)
        return self.opened[file, dtype]

    def unseen(self) -> list[str]:
        """Recorded tensors that nobody has looked at, in no precision; and files of tensors that nobody has opened."""
        left: dict[str, set[str]] = {}
        for (file, _), recorded in self.opened.items():
            left[file] = left.get(file, set(recorded)) - recorded.seen
        files = sorted(path.stem for path in self.folder.glob("*.safetensors"))
        closed = [f"{file}: all of it" for file in files if file not in left]
        return closed + [f"{file}: {key}" for file, keys in left.items() for key in sorted(keys)]

    def faults(self) -> list[str]:
        """Files that the manifest or the config lists and that are missing or not what they were."""
        if not self.has("config.json"):
            return ["config.json is missing"]
        try:
            _ = self.config
        except ValueError as error:
            return [f"config.json cannot be read: {error}"]
        if self.entry is None:
            listed = self.config.get("files", [])
            return [f"{name} is missing" for name in listed if not self.has(name)]
        faults: list[str] = []
        for name, said in self.entry.get("files", {}).items():
            if not self.has(name):
                faults.append(f"{name} is missing")
            elif hashlib.sha256((self.folder / name).read_bytes()).hexdigest() != said["sha256"]:
                faults.append(f"the checksum of {name} is not that of the manifest")
        return faults


def find_cases(folder: Path) -> list[Case]:
    """The cases under a folder: those that its manifest lists, and those that lie there besides.

    Or the folder itself, if it is a case; the manifest is then looked for above it.

    A listed case need not lie where its key says; its last part names the folder. One that is nowhere is a case without
    files.

    Raises:
        UserError: no such folder, no case, or a manifest that cannot be read.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; give one that holds recorded cases, or a single case")
    folder = folder.resolve()
    if (folder / "config.json").is_file():
        above = next((up for up in folder.parents[:3] if (up / MANIFEST).is_file()), None)
        entries, tolerances = _manifest(above)
        return [Case(folder, _entry(entries, folder), tolerances)]
    entries, tolerances = _manifest(folder if (folder / MANIFEST).is_file() else None)
    cases = {folder_of(folder, key): entry for key, entry in entries.items()}
    present = {config.parent: None for depth in ("*", "*/*", "*/*/*") for config in folder.glob(f"{depth}/config.json")}
    cases = present | cases
    if not cases:
        raise UserError(f"no case in {folder}: no {MANIFEST}, and no folder with a config.json")
    return [Case(path, entry, tolerances) for path, entry in sorted(cases.items())]


def folder_of(root: Path, key: str) -> Path:
    """Where the case of a manifest's key lies: root/key, or the folder of that name nearest to the root."""
    name = key.rsplit("/", 1)[-1]
    places = [root / key, root / name, *(config.parent for config in sorted(root.glob(f"**/{name}/config.json")))]
    return next((place for place in places if place.is_dir()), root / name)


def _entry(entries: Mapping[str, Any], folder: Path) -> Any:
    return next((entry for key, entry in entries.items() if key.rsplit("/", 1)[-1] == folder.name), None)


def _manifest(folder: Path | None) -> tuple[dict[str, Any], dict[str, Limits]]:
    if folder is None:
        return {}, dict(DEFAULTS)
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return dict(manifest.get("cases", {})), read_tolerances(manifest.get("tolerances", {}))
    except (ValueError, AttributeError) as error:
        raise UserError(f"{folder / MANIFEST} cannot be read: {error}") from error
