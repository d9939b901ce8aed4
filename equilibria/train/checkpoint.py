"""Checkpoints: safetensors for every tensor, JSON for the rest, no pickle; each written whole or not at all.

A checkpoint is a folder:

    model.safetensors      parameters and buffers; tied ones once
    optimizer.safetensors  what the optimizer keeps of each parameter, as "<parameter>/<name>"
    position.safetensors   the memory carried between segments, and the state of the random generators
    state.json             step, place in the text, totals, configuration, and the SHA-256 of the files above
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from equilibria.data.disk import sha256, sync
from equilibria.solution import UserError
from equilibria.train.whole import load_whole_weights

MODEL, OPTIMIZER, POSITION, STATE = (
    "model.safetensors",
    "optimizer.safetensors",
    "position.safetensors",
    "state.json",
)


def write_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Replace the folder `target` by what `fill(folder)` writes, so that a kill at any moment leaves a whole one.

    A folder cannot be renamed over another, so the old one steps aside first; `settle_folder` puts it back should the
    process die between the two renames. Where `fill` raises, the old one stays and nothing of the new.
    """
    settle_folder(target)
    fresh, old = _beside(target, "new"), _beside(target, "old")
    try:
        fresh.mkdir(parents=True)
        fill(fresh)
        for path in (*fresh.rglob("*"), fresh):
            sync(path)
        if target.exists():
            target.rename(old)
        fresh.rename(target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def settle_folder(target: Path) -> None:
    """Clear away what an interrupted `write_folder` left, keeping the last whole version."""
    fresh, old = _beside(target, "new"), _beside(target, "old")
    if old.exists() and not target.exists():
        old.rename(target)
    shutil.rmtree(old, ignore_errors=True)
    shutil.rmtree(fresh, ignore_errors=True)


def write_json(path: Path, values: Any) -> None:
    """Write a JSON file, whole or not at all."""
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(json.dumps(values, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    sync(fresh)
    fresh.replace(path)


def save_checkpoint(
    folder: Path,
    state: dict[str, Any],
    weights: dict[str, Tensor],
    optimizer: dict[str, Tensor] | None = None,
    position: dict[str, Tensor] | None = None,
) -> None:
    """Write a checkpoint; `state` must be plain values. Without optimizer and position it serves evaluation alone.

    `weights` and `optimizer` are as `equilibria.train.whole` gives them.
    """

    def fill(fresh: Path) -> None:
        _save_weights(weights, fresh / MODEL)
        if optimizer is not None:
            _save_tensors(optimizer, fresh / OPTIMIZER)
        if position is not None:
            _save_tensors(position, fresh / POSITION)
        digests = {path.name: sha256(path) for path in sorted(fresh.iterdir())}
        write_json(fresh / STATE, {**state, "sha256": digests})

    write_folder(folder, fill)


def load_state(folder: Path) -> dict[str, Any]:
    """The JSON part of a checkpoint."""
    settle_folder(folder)
    path = folder / STATE
    if not path.is_file():
        raise UserError(f"there is no checkpoint in {folder}; give a run that has saved one")
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(path, str(error)) from error
    if not isinstance(state, dict) or not isinstance(state.get("sha256"), dict):
        raise _damaged(path, "it lacks the digests of the other files")
    return state


def load_weights(folder: Path, model: nn.Module) -> None:
    """Load the parameters and buffers of a checkpoint into a model of this process; a UserError names what does not fit."""
    load_whole_weights(model, read_weights(folder, model))


def read_weights(folder: Path, model: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of a checkpoint, tied ones once; a UserError names what does not fit the model."""
    load_state(folder)
    _check_same_shapes(folder / MODEL, model)
    return _load_tensors(folder / MODEL)


def load_optimizer(folder: Path) -> dict[str, Tensor]:
    """What the optimizer kept of each parameter, as it was given to `save_checkpoint`."""
    return _load_tensors(folder / OPTIMIZER)


def load_position(folder: Path) -> dict[str, Tensor]:
    """The memory and generator states, as they were given to `save_checkpoint`."""
    return _load_tensors(folder / POSITION)


def random_state() -> dict[str, Tensor]:
    """States of the random generators that training in this process draws from."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_state(states: dict[str, Tensor]) -> None:
    """Put the generators back where `random_state` found them, as far as this machine has them."""
    torch.set_rng_state(states["cpu"])
    if torch.cuda.is_available() and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])


def _beside(target: Path, suffix: str) -> Path:
    return target.with_name(f".{target.name}.{suffix}")


def _save_weights(weights: dict[str, Tensor], path: Path) -> None:
    """Tied ones once, under the first of their names; the metadata says which other names they have."""
    kept: dict[int, str] = {}
    tied = {name: first for name in sorted(weights) if (first := kept.setdefault(id(weights[name]), name)) != name}
    _save_tensors({name: tensor for name, tensor in weights.items() if name not in tied}, path, tied)


def _save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)


def _check_digest(path: Path, digests: dict[str, str]) -> None:
    """The file must be the very one that was written: a flipped bit would go unnoticed by safetensors."""
    if not path.is_file():
        raise _damaged(path, "it is missing")
    if sha256(path) != digests.get(path.name):
        raise _damaged(path, "its content is not what was written")


def _load_tensors(path: Path) -> dict[str, Tensor]:
    _check_digest(path, load_state(path.parent)["sha256"])
    try:
        return load_file(path)
    except SafetensorError as error:
        raise _damaged(path, str(error)) from error


def _check_same_shapes(path: Path, model: nn.Module) -> None:
    try:
        with safe_open(path, framework="pt") as file:
            stored = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping
            tied = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise _damaged(path, str(error)) from error
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    differences = [
        f"{name} is {stored[name]}, the model has {shape}"
        for name, shape in wanted.items()
        if name in stored and stored[name] != shape
    ]
    differences += [f"{name} is missing" for name in wanted if name not in stored and name not in tied]
    differences += [f"{name} is unknown to the model" for name in stored if name not in wanted]
    if differences:
        more = f", and {len(differences) - 3} more differences" if len(differences) > 3 else ""
        raise UserError(
            f"{path} holds another model: {'; '.join(differences[:3])}{more}; use the config.json it was trained with"
        )


def _damaged(path: Path, reason: str) -> UserError:
    remedy = "restore that folder from a copy, or start a new run"
    return UserError(f"the checkpoint file {path} is damaged: {' '.join(reason.split())}; {remedy}")
