"""What a checkpoint of a run holds besides weights and optimizer, and how a run goes on from it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from equilibria.solution import UserError
from equilibria.train import checkpoint
from equilibria.train.config import RunConfig, to_json
from equilibria.train.schedule import Cuts
from equilibria.train.state import TrainState


@dataclass(frozen=True, kw_only=True)
class Resumed:
    """Where a run goes on."""

    state: TrainState
    cuts: Cuts
    memory: Any


def save_run(
    folder: Path,
    config: RunConfig,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    state: TrainState,
    cuts: Cuts,
    memory: Any,
    fingerprint: str,
) -> None:
    """Write the checkpoint that `load_run_state` reads. `memory` is a NamedTuple of tensors, or None."""
    position = checkpoint.random_state()
    if memory is not None:
        position |= {f"memory/{name}": tensor for name, tensor in memory._asdict().items()}
    values = {
        **dataclasses.asdict(state),
        "cuts": cuts.to_json(),
        "corpus_sha256": fingerprint,
        "config": to_json(config),
    }
    checkpoint.save_checkpoint(folder, values, model, optimizer, position)


def restore_run(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, *, fingerprint: str, device: torch.device
) -> Resumed:
    """Put weights, optimizer and random generators where the checkpoint has them, and return the rest of it.

    Raises UserError for a checkpoint that is damaged, of another version, or of a run on another text.
    """
    stored = checkpoint.load_state(folder)
    try:
        state = TrainState.from_json(stored)
        cuts, trained_on = Cuts(**stored["cuts"]), stored["corpus_sha256"]
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder} was written by another version: it lacks {error}; start a new run") from error
    if trained_on != fingerprint:
        raise UserError(f"the training text is not the one that {folder} was trained on; give the same --data-dir")
    checkpoint.load_weights(folder, model)
    checkpoint.load_optimizer(folder, model, optimizer)
    position = checkpoint.load_position(folder)
    checkpoint.set_random_state(position)
    return Resumed(state=state, cuts=cuts, memory=_memory(position, model, device))


def _memory(position: dict[str, Tensor], model: nn.Module, device: torch.device) -> Any:
    """The memory, of the model's own class."""
    tensors = {
        name.removeprefix("memory/"): tensor.to(device) for name, tensor in position.items() if name.startswith("memory/")
    }
    if not tensors:
        return None
    empty_memory: Any = model.empty_memory
    return type(empty_memory(1))(**tensors)
