"""What a checkpoint of a run holds besides weights and optimizer, and how a run goes on from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from equilibria.solution import UserError
from equilibria.train import checkpoint
from equilibria.train.checkpoints import Checkpoints
from equilibria.train.config import RunConfig, to_json
from equilibria.train.distributed import ALONE, Ranks
from equilibria.train.schedule import Cuts
from equilibria.train.state import TrainState
from equilibria.train.whole import load_whole_optimizer, load_whole_weights, whole_optimizer, whole_weights


@dataclass(frozen=True, kw_only=True)
class Resumed:
    """Where a run goes on."""

    state: TrainState
    cuts: Cuts
    memory: Any


def save_run(
    checkpoints: Checkpoints,
    config: RunConfig,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    state: TrainState,
    cuts: Cuts,
    memory: Any,
    fingerprint: str,
    ranks: Ranks = ALONE,
) -> None:
    """Write a checkpoint for `restore_run`; `memory`, the rows of this process, is a NamedTuple of tensors or None.

    All processes of a job call it, and the first writes: the memory of all rows in order, and each one's random state.
    """
    weights, optimizer_items = whole_weights(model, ranks), whole_optimizer(model, optimizer, ranks)
    position = gather_position(memory, checkpoint.random_state(), ranks)
    if not ranks.is_main:
        return
    values = {
        **dataclasses.asdict(state),
        "cuts": cuts.to_json(),
        "corpus_sha256": fingerprint,
        "config": to_json(config),
    }
    checkpoints.save(
        state.step,
        values,
        keep=config.keep_checkpoints,
        model=weights,
        optimizer=optimizer_items,
        position=position,
    )


def restore_run(
    checkpoints: Checkpoints,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    fingerprint: str,
    device: torch.device,
    ranks: Ranks = ALONE,
) -> Resumed:
    """Put weights, optimizer and random generators where the newest checkpoint without damage has them; return the rest.

    The first process reads and tells the others, which may be another number of processes than wrote the checkpoint.
    Raises UserError where all are damaged, and for a checkpoint of another version, or of a run on another text.
    """
    tensors: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}}

    def read(folder: Path) -> tuple[TrainState, Cuts, dict[str, Tensor]]:
        state, cuts = _values(folder, fingerprint)
        for name in tensors:
            tensors[name] = checkpoint.load_tensors(folder, name)
        checkpoint.check_same_shapes(model, tensors["model"], source=folder)
        return state, cuts, checkpoint.load_tensors(folder, "position")

    state, cuts, position = ranks.from_main(lambda: checkpoints.newest(read))
    load_whole_weights(model, tensors["model"], ranks)
    load_whole_optimizer(model, optimizer, tensors["optimizer"], ranks)
    mine = f"random/{ranks.rank}/"
    random = {name.removeprefix(mine): tensor for name, tensor in position.items() if name.startswith(mine)}
    if random:  # else this process had no part in the run so far, and keeps its own
        checkpoint.set_random_state(random)
    return Resumed(state=state, cuts=cuts, memory=memory_of(position, model, device, ranks))


def _values(folder: Path, fingerprint: str) -> tuple[TrainState, Cuts]:
    stored = checkpoint.load_state(folder)
    try:
        state = TrainState.from_json(stored)
        cuts, trained_on = Cuts(**stored["cuts"]), stored["corpus_sha256"]
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder} was written by another version: it lacks {error}; start a new run") from error
    if trained_on != fingerprint:
        raise UserError(f"the text is not the one that {folder} was trained and validated on; give the same --data-dir")
    return state, cuts


def gather_position(memory: Any, random: Mapping[str, Tensor], ranks: Ranks = ALONE) -> dict[str, Tensor]:
    """The memory of all rows in order and each process's random state, as tensors by name; all processes must call it."""
    position: dict[str, Tensor] = {}
    for rank, states in enumerate(ranks.gather(dict(random))):
        position |= {f"random/{rank}/{name}": tensor for name, tensor in states.items()}
    for name, rows in ({} if memory is None else memory._asdict()).items():
        position[f"memory/{name}"] = ranks.gather_rows(rows)
    return position


def memory_of(
    position: Mapping[str, Tensor], model: nn.Module, device: torch.device | str = "cpu", ranks: Ranks = ALONE
) -> Any:
    """The memory in a position, the rows of this process, of the model's own class; None where there is none."""
    tensors = {
        name.removeprefix("memory/"): tensor[ranks.rows(len(tensor))].to(device, copy=True)
        for name, tensor in position.items()
        if name.startswith("memory/")
    }
    if not tensors:
        return None
    empty_memory: Any = model.empty_memory
    return type(empty_memory(1))(**tensors)
