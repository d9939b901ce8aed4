"""One checkpoint: safetensors for every tensor, JSON for the rest, no pickle; written whole or not at all.

A checkpoint is a folder:

    model.safetensors      parameters and buffers; tied ones once
    optimizer.safetensors  what the optimizer keeps of each parameter, as "<parameter>/<name>"
    position.safetensors   the memory carried between segments, and the states of the random generators
    state.json             step, place in the text, totals, configuration
    SHA256SUMS             of the files above; `sha256sum -c SHA256SUMS` checks them too

Everything goes through plain tensors by name, so that who gathers or scatters them (one process or many) is no concern
of this file. Whatever is read is first compared with its checksum. `equilibria.train.checkpoints` keeps several.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from equilibria.data.disk import present, sha256, write_folder, write_json, write_text
from equilibria.solution import UserError
from equilibria.train.whole import load_whole_weights

STATE, SUMS = "state.json", "SHA256SUMS"


class DamagedCheckpoint(UserError):
    """A file of a checkpoint is missing, or not the one that was written."""


# -- the folder --------------------------------------------------------------------------------------------------


def save_checkpoint(folder: Path, values: Mapping[str, Any], **tensors: Mapping[str, Tensor] | None) -> None:
    """Write a checkpoint: plain `values`, and tensors by name, those of `model=...` in model.safetensors and so on.

    Raises OSError where the disk is full; then the folder is what it was before.
    """

    def fill(fresh: Path) -> None:
        for name, each in tensors.items():
            if each is not None:
                _save_tensors(fresh / f"{name}.safetensors", each)
        write_json(fresh / STATE, values)
        digests = {path.name: sha256(path) for path in sorted(fresh.iterdir())}
        write_text(fresh / SUMS, "".join(f"{digest}  {name}\n" for name, digest in digests.items()))

    write_folder(folder, fill)


def load_state(folder: Path) -> dict[str, Any]:
    """The JSON part of a checkpoint."""
    path = _checked(folder, STATE)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _damaged(path, str(error)) from error
    if not isinstance(values, dict):
        raise _damaged(path, "it holds no values by name")
    return values


def load_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    """The tensors saved as `name`: "model", "optimizer" or "position". All that were tied are there."""
    path = _checked(folder, f"{name}.safetensors")
    try:
        with safe_open(path, framework="pt") as file:
            # Copies, for what the library returns is the file itself, mapped into memory.
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118 - no mapping
            tied = file.metadata() or {}
    except SafetensorError as error:
        raise _damaged(path, str(error)) from error
    return tensors | {key: tensors[first] for key, first in tied.items() if first in tensors}


def verify(folder: Path) -> None:
    """Raise DamagedCheckpoint unless every file of a checkpoint is the one that was written."""
    for name in _checksums(folder):
        _checked(folder, name)


def _checksums(folder: Path) -> dict[str, str]:
    folder = present(folder)
    if not folder.is_dir():
        raise UserError(f"there is no checkpoint in {folder}; give a run that has saved one")
    path = folder / SUMS
    if not path.is_file():
        raise _damaged(path, "it is missing")
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    sums = {name: digest for digest, _, name in (line.partition("  ") for line in lines) if name}
    there = {each.name for each in folder.iterdir()} - {SUMS}
    if not there <= set(sums) or STATE not in sums:
        raise _damaged(path, f"it lacks {', '.join(sorted((there | {STATE}) - set(sums)))}")
    return sums


def _checked(folder: Path, name: str) -> Path:
    """The path of a file that is the very one that was written: safetensors would not notice a flipped bit."""
    sums, path = _checksums(folder), present(folder) / name
    try:
        if path.is_file() and sha256(path) == sums.get(name):
            return path
    except OSError as error:
        if error.errno != errno.EIO:  # what the disk cannot read is damaged; what is forbidden or unreachable is not
            raise
        raise _damaged(path, "the disk cannot read it") from error
    raise _damaged(path, "its content is not what was written" if path.is_file() else "it is missing")


def _save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    kept, tied = {}, {}
    seen: dict[tuple[Any, ...], str] = {}
    for name, tensor in tensors.items():
        place = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and place in seen:
            tied[name] = seen[place]
        else:
            seen[place] = name
            kept[name] = _owner(tensor.detach())
    try:
        save_file(kept, path, metadata=tied or None)
    except SafetensorError as error:  # the library gives the number of a failure of the system in words alone
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        code = int(number.group(1))
        raise OSError(code, os.strerror(code), str(path)) from error


def _owner(tensor: Tensor) -> Tensor:
    """The tensor, contiguous and the only one of its storage: safetensors saves no views."""
    whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole else tensor.clone(memory_format=torch.contiguous_format)


def _damaged(path: Path, reason: str) -> DamagedCheckpoint:
    remedy = "restore that folder from a copy, or start a new run"
    return DamagedCheckpoint(f"the checkpoint file {path} is damaged: {' '.join(reason.split())}; {remedy}")


# -- what the tensors are of --------------------------------------------------------------------------------------


def load_weights(folder: Path, model: nn.Module) -> None:
    """Load the parameters and buffers of a checkpoint into a model of this process; a UserError names what does not fit."""
    tensors = load_tensors(folder, "model")
    check_same_shapes(model, tensors, source=folder)
    load_whole_weights(model, tensors)


def check_same_shapes(model: nn.Module, tensors: Mapping[str, Tensor], *, source: Path) -> None:
    """Raise UserError, which begins with `source`, unless these are the parameters and buffers of such a model."""
    stored = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    differences = [
        f"{name} is {stored[name]}, the model has {shape}"
        for name, shape in wanted.items()
        if name in stored and stored[name] != shape
    ]
    differences += [f"{name} is missing" for name in wanted if name not in stored]
    differences += [f"{name} is unknown to the model" for name in stored if name not in wanted]
    if differences:
        more = f", and {len(differences) - 3} more differences" if len(differences) > 3 else ""
        raise UserError(
            f"{source} holds another model: {'; '.join(differences[:3])}{more}; use the config.json it was trained with"
        )


def random_state() -> dict[str, Tensor]:
    """States of the random generators that training in this process draws from."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_state(states: Mapping[str, Tensor]) -> None:
    """Put the generators back where `random_state` found them, as far as this machine has them."""
    torch.set_rng_state(states["cpu"])
    if torch.cuda.is_available() and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])
