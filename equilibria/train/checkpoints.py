"""The last few checkpoints of a run, each in a folder that is named for its step."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from equilibria.data.disk import remove_folder, settle_folders
from equilibria.solution import UserError
from equilibria.train.checkpoint import DamagedCheckpoint, save_checkpoint

Loaded = TypeVar("Loaded")


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints in a folder: step-00000100, step-00000200, ...

    A kill at any moment, or a full disk, leaves every checkpoint that was there; the scratch of a killed process is
    cleared at the next `save`.
    """

    folder: Path

    def path(self, step: int) -> Path:
        """The folder of the checkpoint of a step."""
        return self.folder / f"step-{step:08d}"

    def steps(self) -> list[int]:
        """Steps with a checkpoint, rising."""
        if not self.folder.is_dir():
            return []
        # A folder that was being replaced when the process died is whole under its other name (see `disk.present`).
        matches = (re.fullmatch(r"step-(\d{8,})|\.step-(\d{8,})\.old", path.name) for path in self.folder.iterdir())
        return sorted({int(match[1] or match[2]) for match in matches if match})

    def save(self, step: int, values: Mapping[str, Any], *, keep: int, **tensors: Mapping[str, Tensor]) -> None:
        """Write the checkpoint of a step (see `save_checkpoint`); once it is durable, keep the last `keep` alone.

        Those of later steps go as well: they belong to a course that the run has left by going back.
        """
        settle_folders(self.folder)
        save_checkpoint(self.path(step), values, **tensors)
        before = [each for each in self.steps() if each <= step]
        for each in set(self.steps()) - set(before[-keep:]):
            remove_folder(self.path(each))

    def newest(self, load: Callable[[Path], Loaded]) -> Loaded:
        """What `load(folder)` returns for the newest checkpoint; for the one before, where it raises DamagedCheckpoint.

        Standard error says which were passed over. Where all are damaged, that is a UserError.
        """
        steps = self.steps()
        if not steps:
            raise UserError(f"there is no checkpoint in {self.folder}; give a run that has saved one")
        damage: list[str] = []
        for step in reversed(steps):
            try:
                loaded = load(self.path(step))
            except DamagedCheckpoint as error:
                damage.append(str(error).rpartition("; ")[0])
                continue
            if damage:
                say(f"{'; '.join(damage)}; going back to the checkpoint of step {step}")
            return loaded
        what = "the only checkpoint" if len(steps) == 1 else f"all {len(steps)} checkpoints"
        raise UserError(
            f"{what} in {self.folder} cannot be used: {'; '.join(damage)}; "
            "restore one of these folders from a copy, or start a new run"
        )


def say(message: str) -> None:
    """Tell the user, on standard error, in one line."""
    print(f"warning: {' '.join(message.split())}", file=sys.stderr, flush=True)
