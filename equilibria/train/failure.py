"""What is kept of a step whose loss was not finite, so that it can be looked at and repeated.

RUN/failures/step-XXXXXXXX/ is a folder like a checkpoint (see `equilibria.train.checkpoint`):

    model.safetensors   the weights that the step began with
    batch.safetensors   its tokens and targets, the memory they were read with, the states of the random generators
    solves.safetensors  statistics of its solves, forward and backward, as far as it came
    state.json          step, reason, place in the text, learning rate, configuration, rows of metrics before it
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from equilibria.solution import NonFiniteError, Stats
from equilibria.train.checkpoint import load_state, load_tensors, random_state, save_checkpoint, set_random_state
from equilibria.train.config import RunConfig, from_json, to_json
from equilibria.train.distributed import Ranks
from equilibria.train.resume import gather_position, memory_of
from equilibria.train.run_folder import read_metrics
from equilibria.train.state import TrainState
from equilibria.train.whole import whole_weights

_PER_SAMPLE = ("residual", "relative", "steps", "status", "trace")


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A step whose loss, gradient or solve was not finite, or a validation; read by `load_failure`.

    The weights it began with are `load_weights(failure.folder, model)`.
    """

    folder: Path
    step: int
    """Number of the step, from 1; of a validation, that of the step before it."""
    reason: str
    """What was not finite."""
    in_validation: bool
    """Whether it was no step, but the validation after it; `batches` is then empty."""
    checkpoint: int | None
    """Step of the last checkpoint before it."""
    config: RunConfig
    vocab_size: int
    """Words the model knows, for `build_model(failure.config, failure.vocab_size)`."""
    learning_rate: float
    depth: int | None
    """Blocks of the stack, where the step belonged to the warm-up; None: an equilibrium."""
    jacobian_weight: float
    """Of the Jacobian loss in this step."""
    max_evals: int
    """Evaluations that a solve of this step might spend."""
    batches: list[tuple[Tensor, Tensor]]
    """Tokens and targets (B, L) of each segment that the step read."""
    solves: list[Stats]
    """Of its forward solves in the first process, in order; the last may be the one that failed."""
    nonfinite_gradients: list[str]
    """Parameters whose gradient had become infinite or NaN."""
    metrics: list[dict[str, Any]]
    """The rows of metrics between the last checkpoint and this step."""
    position: Mapping[str, Tensor]
    """Memory and random states at the start of the step."""

    def memory(self, model: nn.Module) -> Any:
        """The memory that the first batch was read with, of the model's own class; None at the start of a text."""
        return memory_of(self.position, model)

    def set_random_state(self) -> None:
        """Put the random generators where they were when the step began, in the first process of the job."""
        states = {name.removeprefix("random/0/"): each for name, each in self.position.items() if "random/0/" in name}
        set_random_state(states)


def load_failure(folder: Path) -> Failure:
    """Read RUN/failures/step-XXXXXXXX; a UserError says what is wrong with it.

    >>> failure = load_failure(Path("runs/text/failures/step-00000120"))  # doctest: +SKIP
    """
    values, batch = load_state(folder), load_tensors(folder, "batch")
    config = from_json(values.pop("config"), str(folder))
    batches = [(batch[f"tokens/{i}"], batch[f"targets/{i}"]) for i in range(values.pop("segments"))]
    solves = _load_solves(load_tensors(folder, "solves"), values.pop("solves"))
    kept = {item.name for item in dataclasses.fields(Failure)} & set(values)
    return Failure(
        folder=folder,
        config=config,
        batches=batches,
        solves=solves,
        position=batch,
        **{name: values[name] for name in kept},
    )


class StepWatch:
    """Keeps how the present step began, and the statistics of its solves, in case that it fails."""

    def __init__(self, model: nn.Module) -> None:
        self.solves: list[Stats] = []
        self.began: TrainState | None = None
        self._memory: Any = None
        self._random: dict[str, Tensor] = {}
        model.register_forward_hook(self._keep_solves)

    def begin(self, state: TrainState, memory: Any) -> None:
        """A step begins: its place in the text, and the memory of the rows of this process."""
        self.began, self._memory, self._random = dataclasses.replace(state), memory, random_state()
        self.solves = []

    def end(self) -> None:
        """The step is done; what follows is none."""
        self.began, self._memory = None, None

    def position(self, ranks: Ranks) -> dict[str, Tensor]:
        """Memory and random states of all processes at the start of the step; all of them must call it."""
        return gather_position(self._memory, self._random, ranks)

    def _keep_solves(self, model: nn.Module, inputs: Any, output: Any) -> None:
        if model.training:
            self.solves += output.stats


def save_failure(
    folder: Path,
    watch: StepWatch,
    model: nn.Module,
    error: NonFiniteError,
    *,
    batches: Sequence[tuple[Tensor, Tensor]],
    ranks: Ranks,
    config: RunConfig,
    metrics: Path,
    checkpoint: int | None,
    **values: Any,
) -> None:
    """Write what `load_failure` reads; all processes of a job call it, and the first writes.

    `batches` are those the step read, whole; `metrics` is the file whose rows after the checkpoint are kept; `values` are
    the plain fields of `Failure`.
    """
    weights, position = whole_weights(model, ranks), watch.position(ranks)
    if not ranks.is_main:
        return
    solves = watch.solves + ([error.solution.stats] if error.solution is not None else [])
    tensors, described = _solve_tensors(solves)
    for index, (tokens, targets) in enumerate(batches):
        position |= {f"tokens/{index}": tokens, f"targets/{index}": targets}
    state = {
        **values,
        "reason": reason(error),
        "checkpoint": checkpoint,
        "segments": len(batches),
        "solves": described,
        "nonfinite_gradients": _nonfinite_gradients(model),
        "metrics": [row for row in read_metrics(metrics) if row["step"] > (checkpoint or 0)],
        "config": to_json(config),
    }
    save_checkpoint(folder, state, model=weights, batch=position, solves=tensors)


def reason(error: NonFiniteError) -> str:
    """What the error says, in one line; what it advises is for users of the library."""
    return " ".join(str(error).split()).split(". ")[0].rstrip(".;")


def finite(tensors: Iterable[Tensor]) -> bool:
    """Whether the tensors, or the shards of this process, hold neither infinities nor NaN."""
    return all(bool(_own(tensor).isfinite().all()) for tensor in tensors)


def _nonfinite_gradients(model: nn.Module) -> list[str]:
    gradients = ((name, parameter.grad) for name, parameter in model.named_parameters())
    return [name for name, gradient in gradients if gradient is not None and not finite([gradient])]


def _own(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _solve_tensors(solves: Sequence[Stats], prefix: str = "") -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """The statistics as tensors by name, and the rest of each solve as plain values."""
    tensors: dict[str, Tensor] = {}
    described = []
    for index, stats in enumerate(solves):
        own = f"{prefix}{index}/"
        tensors |= {own + name: each for name in _PER_SAMPLE if (each := getattr(stats, name)) is not None}
        backward, inner = _solve_tensors(stats.backward, own + "backward/")
        tensors |= backward
        described.append({"evaluations": stats.evaluations, "backward": inner})
    return tensors, described


def _load_solves(tensors: Mapping[str, Tensor], described: Sequence[dict[str, Any]], prefix: str = "") -> list[Stats]:
    found = []
    for index, values in enumerate(described):
        own = f"{prefix}{index}/"
        each: dict[str, Any] = {name: tensors.get(own + name) for name in _PER_SAMPLE}
        backward = _load_solves(tensors, values["backward"], own + "backward/")
        found.append(Stats(**each, evaluations=values["evaluations"], backward=backward))
    return found
