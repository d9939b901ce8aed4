"""The configuration of a run: plain values only, stored as JSON in the run folder and overridable on the command line.

Strings that choose a solver, an adjoint or a corpus become objects in `equilibria.recipes.build`. The text under a
field is the help that `equilibria train RECIPE --help` prints, and each field name is one option (`lr` is `--lr`), so
names are unique across the groups.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import cattrs
import tyro

from equilibria.models.deq_transformer import TransformerShape
from equilibria.solution import UserError

CorpusName = Literal["python-docs", "wikitext-2", "penn-treebank", "text"]
MethodName = Literal["anderson", "broyden", "newton-krylov", "picard", "reversible"]
BackwardName = Literal["implicit", "shine", "neumann", "phantom", "unrolled", "checkpointed", "reversible"]


def _check(condition: bool, option: str, value: object, remedy: str) -> None:
    if not condition:
        raise UserError(f"--{option.replace('_', '-')} is {value}; {remedy}")


def _check_positive(config: object, *names: str) -> None:
    """Each named field that is not None must be above zero."""
    for name in names:
        value = getattr(config, name)
        _check(value is None or value > 0, name, value, "give a number above zero")


def _check_not_negative(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _check(value is None or value >= 0, name, value, "give zero or more")


@dataclass(frozen=True, kw_only=True)
class ModelConfig(TransformerShape):
    """Shape of the Transformer; its vocabulary comes from the corpus."""

    def __post_init__(self) -> None:
        _check_positive(self, "d_model", "n_head", "d_inner", "local_size", "subseq_len", "depth")
        _check_positive(self, "init_std", "inject_std")
        _check_not_negative(self, "mem_len")
        fits = self.d_model % self.n_head == 0 and self.d_model % 2 == 0
        _check(fits, "d_model", self.d_model, f"give an even multiple of --n-head {self.n_head}")
        _check(0 <= self.dropout < 1, "dropout", self.dropout, "give a share from 0 up to, not including, 1")


@dataclass(frozen=True, kw_only=True)
class SolveConfig:
    """How the fixed point is found, and how gradients pass through it."""

    method: MethodName = "anderson"
    """Solver of the forward pass."""
    history: int = 5
    """Past steps that Anderson or Broyden keeps."""
    damping: float = 1.0
    """Length of a step of Picard or Anderson; 1 is the full step. Of the reversible iteration: its β, below 1."""
    rtol: float = 1e-2
    """A sample has converged when ‖f(z) - z‖ <= atol + rtol ‖f(z)‖."""
    atol: float = 1e-6
    """The absolute part of that test."""
    max_evals: int = 16
    """Evaluations of f that one solve may spend in training."""
    eval_rtol: float | None = None
    """The relative tolerance outside training; None: as in training."""
    eval_max_evals: int | None = None
    """The budget of evaluations outside training; None: as in training."""
    backward: BackwardName = "implicit"
    """implicit: solve the linear system of the implicit function theorem; shine: from what Anderson or Broyden learnt;
    neumann: the first terms of its series; phantom: differentiate a few last steps; unrolled: the whole solve, or
    checkpointed, in less memory; reversible: walk the reversible method back."""
    backward_rtol: float = 1e-2
    """Relative tolerance of the backward solve, for implicit and shine."""
    backward_max_evals: int = 16
    """Vector-Jacobian products that one backward solve may spend, for implicit and shine."""
    phantom_steps: int = 1
    """Steps that the phantom gradient differentiates, or terms of neumann."""
    jacobian_weight: float = 0.0
    """Weight of the Jacobian loss, which keeps solves short as training goes on; 0 for none."""
    jacobian_share: float = 0.4
    """Share of the steps, drawn at random, that the Jacobian loss is added to."""
    jacobian_increment: float = 0.1
    """Added to the weight every --jacobian-every steps."""
    jacobian_every: int | None = None
    """Steps between two increments of the weight; None: it stays."""

    def __post_init__(self) -> None:
        _check_positive(self, "history", "max_evals", "eval_max_evals", "backward_max_evals", "phantom_steps")
        _check_positive(self, "rtol", "eval_rtol", "backward_rtol", "jacobian_every")
        _check_not_negative(self, "atol", "jacobian_weight", "jacobian_increment")
        _check(0 <= self.jacobian_share <= 1, "jacobian_share", self.jacobian_share, "give a share between 0 and 1")
        _check(0 < self.damping <= 2, "damping", self.damping, "give a number above 0 and at most 2")
        if self.method == "reversible":
            _check(self.damping < 1, "damping", self.damping, "the reversible method needs one below 1, such as 0.5")
        undone = self.backward != "reversible" or self.method == "reversible"
        _check(undone, "backward", self.backward, f"give --method reversible as well, for {self.method} cannot be undone")
        learns = self.backward != "shine" or self.method in ("anderson", "broyden")
        _check(learns, "backward", self.backward, f"give --method anderson or broyden, for {self.method} learns nothing")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which text, and how it is cut into tokens."""

    corpus: CorpusName = "python-docs"
    """Where the text comes from; all but python-docs need --data-dir."""
    data_dir: Path | None = None
    """Folder that holds the files of the corpus."""
    vocab_size: int | None = None
    """Size of the byte-pair vocabulary (None: 2048); word-level corpora bring their own."""

    def __post_init__(self) -> None:
        enough = self.vocab_size is None or self.vocab_size >= 256
        _check(enough, "vocab_size", self.vocab_size, "a byte-pair vocabulary needs at least the 256 bytes")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW, its schedule, and how much of the text one step sees."""

    lr: float = 1e-3
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.98)
    """Decay of Adam's two running means."""
    weight_decay: float = 0.0
    """Decoupled decay of the matrices; vectors are spared."""
    warmup_steps: int = 50
    """Steps over which the learning rate rises linearly from zero."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """After the rise: down to zero along a half cosine by the last step, or constant."""
    clip: float = 1.0
    """Largest norm of the gradient; longer ones are scaled down to it."""
    steps: int = 500
    """Optimizer steps of the whole run."""
    batch_size: int = 16
    """Lanes of text read side by side."""
    length: int = 64
    """Tokens of each lane in one segment."""
    accumulate: int = 1
    """Consecutive segments whose gradients make up one step."""
    pretrain_steps: int = 0
    """First train the explicit stack for this many steps, then the equilibrium."""
    pretrain_depth: int = 4
    """Blocks in that stack."""
    minutes: float | None = None
    """Stop cleanly when training has taken this long, resumed parts included; the schedule still follows --steps."""

    def __post_init__(self) -> None:
        _check_positive(self, "lr", "clip", "steps", "batch_size", "length", "accumulate", "pretrain_depth", "minutes")
        _check_not_negative(self, "weight_decay", "warmup_steps", "pretrain_steps")
        _check(all(0 <= beta < 1 for beta in self.betas), "betas", self.betas, "each must be at least 0 and below 1")


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """The text generated at the end of a run."""

    sample_prompt: str = ""
    """Text to continue; empty: the first words of the validation split."""
    sample_tokens: int = 150
    """Tokens to generate."""
    sample_temperature: float = 0.8
    """Below 1 prefers likely tokens; 0 always takes the likeliest."""
    sample_top_k: int | None = 50
    """Draw from this many likeliest tokens; None: from all."""

    def __post_init__(self) -> None:
        _check_positive(self, "sample_tokens", "sample_top_k")
        _check_not_negative(self, "sample_temperature")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run. Recipes return one, the command line overrides it, and the run folder keeps it."""

    recipe: Annotated[str, tyro.conf.Suppress]
    """Name of the recipe the run began with."""
    model: ModelConfig = field(default_factory=ModelConfig)
    solver: SolveConfig = field(default_factory=SolveConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    twin: bool = True
    """Afterwards train the explicit twin, the block stacked, on the same tokens for comparison."""
    twin_depth: int = 8
    """Blocks of the explicit twin."""
    eval_every: int = 100
    """Steps between validations; each also writes a checkpoint."""
    log_every: int = 10
    """Steps between rows of metrics."""
    eval_batch_size: int = 8
    """Lanes in which a split is read for evaluation."""
    precision: Literal["no", "bf16"] = "no"
    """bf16: mixed precision."""
    seed: int = 0
    """Seed of the initial weights, of dropout and of the sample."""
    threads: int | None = None
    """CPU threads; None: PyTorch's choice."""

    def __post_init__(self) -> None:
        _check_positive(self, "twin_depth", "eval_every", "log_every", "eval_batch_size", "threads")

    @property
    def wants_twin(self) -> bool:
        """Whether a twin is to be trained: not beside a model that is a stack already."""
        return self.twin and self.model.depth is None

    def for_twin(self) -> RunConfig:
        """The same run with the explicit twin as its model, without warm-up phase and wall-clock budget."""
        return dataclasses.replace(
            self,
            model=dataclasses.replace(self.model, depth=self.twin_depth),
            optim=dataclasses.replace(self.optim, pretrain_steps=0, minutes=None),
            twin=False,
        )


# What a resumed run may not change: the tensors in the checkpoint, or the place in the text, depend on it.
FIXED_ON_RESUME = (
    *(f"model.{item.name}" for item in dataclasses.fields(ModelConfig) if item.name != "dropout"),
    "recipe",
    "data.corpus",
    "data.vocab_size",
    "optim.batch_size",
    "optim.length",
    "optim.accumulate",
    "twin_depth",
    "seed",
)

_converter = cattrs.Converter(forbid_extra_keys=True)
_converter.register_unstructure_hook(Path, str)
_converter.register_structure_hook(Path, lambda value, _: Path(value))


def to_json(config: RunConfig) -> dict[str, Any]:
    """The configuration as plain values for `json.dumps`."""
    return _converter.unstructure(config)


def from_json(values: Any, source: str) -> RunConfig:
    """The configuration that `to_json` gave. Unknown or wrong values raise a UserError that begins with `source`."""
    try:
        return _converter.structure(values, RunConfig)
    except Exception as error:  # cattrs raises groups, and plain errors for values that are no mapping
        reasons = [str(error)] if isinstance(error, UserError) else cattrs.transform_error(error, "config", _reason)
        raise UserError(f"{source} is not a configuration of this version: {'; '.join(reasons)}") from error


def load_config(path: Path) -> RunConfig:
    """Read a config.json."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the configuration {path}: {error}") from error
    return from_json(values, str(path))


def _reason(error: BaseException, kind: type | None) -> str:
    return str(error) if isinstance(error, ValueError) else cattrs.v.format_exception(error, kind)


def changed_fields(old: RunConfig, new: RunConfig, names: tuple[str, ...]) -> list[str]:
    """Descriptions such as "d_model 64 -> 128" of the dotted fields in `names` that differ."""
    changes = []
    for name in names:
        before, after = old, new
        for part in name.split("."):
            before, after = getattr(before, part), getattr(after, part)
        if before != after:
            changes.append(f"{name.rsplit('.', 1)[-1]} {before} -> {after}")
    return changes
