"""Where a run stands."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(kw_only=True)
class TrainState:
    """Where a run stands, apart from tensors. Stored in every checkpoint."""

    step: int = 0
    """Optimizer steps done."""
    epoch: int = 0
    """Times the whole training text was read."""
    segment: int = 0
    """Next segment of this epoch."""
    tokens: int = 0
    """Tokens trained on."""
    train_seconds: float = 0.0
    """Wall time of the steps."""
    seconds: float = 0.0
    """Wall time of the steps and validations."""
    validated: int = 0
    """Step of the last validation."""
    best_nll: float | None = None
    """Lowest validation loss so far, nats per token."""
    best_step: int | None = None
    """Step that reached it."""
    peak_memory: int = 0
    """Bytes (see `PeakMemory`)."""
    rollbacks: int = 0
    """Times that the run went back to a checkpoint because a loss was not finite."""

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> TrainState:
        """The state among the values of a checkpoint's state.json; KeyError if one is missing."""
        return cls(**{item.name: values[item.name] for item in dataclasses.fields(cls)})
