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
from cattrs.gen import make_dict_structure_fn, make_dict_unstructure_fn

from equilibria.data.options import TextOptions
from equilibria.solution import UserError
from equilibria.train.checks import check, check_not_negative, check_positive
from equilibria.train.model_config import FAMILIES, Model, TransformerModel, TrellisModel, family, fixed_fields
from equilibria.train.optim_config import OptimConfig, OptimizerName, ScheduleName
from equilibria.train.solve_config import BackwardName, LinearName, MethodName, SolveConfig

__all__ = [
    "FIXED_ON_RESUME",
    "BackwardName",
    "CorpusName",
    "DataConfig",
    "LinearName",
    "MethodName",
    "Model",
    "OptimConfig",
    "OptimizerName",
    "RunConfig",
    "SampleConfig",
    "ScheduleName",
    "SolveConfig",
    "TextOptions",
    "TrackerName",
    "TransformerModel",
    "TrellisModel",
    "changed_fields",
    "from_json",
    "load_config",
    "to_json",
]

CorpusName = Literal[
    "python-docs", "wikitext-103", "wikitext-2", "penn-treebank", "penn-treebank-char", "enwik8", "text8", "copy-memory",
    "text",
]  # fmt: skip


TrackerName = Literal["tensorboard", "wandb", "mlflow", "trackio", "none"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which text, and how it is cut into tokens."""

    corpus: CorpusName = "python-docs"
    """Where the text comes from; text is your own, in --data-dir or --dataset."""
    data_dir: Path | None = None
    """Folder that holds the files of the corpus, for text .txt, .jsonl or .parquet; None: where `equilibria data get` puts
    them."""
    vocab_size: int | None = None
    """Size of the byte-pair vocabulary (None: 2048); other corpora bring their own."""
    original_vocabulary: bool = False
    """Number words as the original code does, which a checkpoint of it needs."""
    delay: int | None = None
    """Steps that the copy-memory task has to remember its symbols for (None: 400)."""
    text: TextOptions = field(default_factory=TextOptions)

    def __post_init__(self) -> None:
        check_positive(self, "delay")
        enough = self.vocab_size is None or self.vocab_size >= 256
        check(enough, "vocab_size", self.vocab_size, "a byte-pair vocabulary needs at least the 256 bytes")


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
        check_positive(self, "sample_tokens", "sample_top_k")
        check_not_negative(self, "sample_temperature")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run. Recipes return one, the command line overrides it, and the run folder keeps it."""

    recipe: Annotated[str, tyro.conf.Suppress]
    """Name of the recipe the run began with."""
    model: Model = field(default_factory=TransformerModel)
    solver: SolveConfig = field(default_factory=SolveConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    start_from_frequencies: bool = False
    """Let the softmax begin with the frequencies of the training tokens; keeps the first solves of a TrellisNet short."""
    twin: bool = True
    """Afterwards train the explicit twin, the block stacked, on the same tokens for comparison."""
    twin_depth: int = 8
    """Blocks of the explicit twin."""
    eval_every: int | None = 100
    """Steps between validations; each also writes a checkpoint. None: one at the end of every epoch."""
    checkpoint_every: int | None = 1000
    """Steps between checkpoints besides those of validations, for runs that are killed; None: at validations alone."""
    keep_checkpoints: int = 3
    """The last so many checkpoints are kept, should the newest be damaged; that of the best validation is kept besides."""
    on_nonfinite: Literal["stop", "roll-back"] = "stop"
    """When a loss, a gradient or a solve becomes infinite or NaN: stop, or go back to the last checkpoint and on with the
    text after the batch where it happened. That batch and its solves are kept under failures/ in the run either way."""
    max_rollbacks: int = 3
    """With --on-nonfinite roll-back: times that a run goes back before it stops."""
    log_every: int = 10
    """Steps between rows of metrics."""
    trackers: tuple[TrackerName, ...] = ("tensorboard",)
    """Where rows of metrics go besides metrics.jsonl: one or several of these, or none."""
    tracker_project: str = "equilibria"
    """With --trackers wandb, mlflow or trackio: project, or experiment, that the run belongs to."""
    eval_batch_size: int = 8
    """Lanes in which a split is read for evaluation."""
    eval_length: int | None = None
    """Tokens of each lane in one segment of an evaluation; None: as in training."""
    max_eval_steps: int | None = None
    """Segments that a validation reads at most; None: the whole split."""
    precision: Literal["no", "bf16"] = "no"
    """bf16: mixed precision."""
    parallel: Literal["ddp", "fsdp"] | None = None
    """With several processes. ddp: each holds the whole model; fsdp: each holds a share of its weights, gradients and
    optimizer (FSDP2). None: what `accelerate launch` was told, else ddp."""
    seed: int = 0
    """Seed of the initial weights, of dropout and of the sample."""
    threads: int | None = None
    """CPU threads of each process; None: PyTorch's choice, or its share of the cores where a machine runs several."""

    def __post_init__(self) -> None:
        check_positive(self, "twin_depth", "eval_every", "checkpoint_every", "log_every", "eval_batch_size", "threads")
        check_positive(self, "eval_length", "max_eval_steps", "keep_checkpoints")
        check_not_negative(self, "seed", "max_rollbacks")
        alone = "none" not in self.trackers or len(self.trackers) == 1
        check(alone, "trackers", " ".join(self.trackers), "none goes with no other")

    @property
    def eval_segment(self) -> int:
        """Tokens of each lane in one segment of an evaluation."""
        return self.optim.length if self.eval_length is None else self.eval_length

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
    "model",
    "recipe",
    "data.corpus",
    "data.vocab_size",
    "data.delay",
    "data.original_vocabulary",
    "data.text.text_field",
    "data.text.max_documents",
    "data.text.tokenizer",
    "data.text.valid_share",
    "data.text.test_share",
    "optim.batch_size",
    "optim.length",
    "optim.variable_length",
    "optim.accumulate",
    "optim.optimizer",
    "optim.momentum",
    "twin_depth",
    "seed",
)

_converter = cattrs.Converter(forbid_extra_keys=True)
_converter.register_unstructure_hook(Path, str)
_converter.register_structure_hook(Path, lambda value, _: Path(value))
_write_model = {name: make_dict_unstructure_fn(kind, _converter) for name, kind in FAMILIES.items()}
_read_model = {
    name: make_dict_structure_fn(kind, _converter, _cattrs_forbid_extra_keys=True) for name, kind in FAMILIES.items()
}


def _model_to_json(model: Model) -> dict[str, Any]:
    name = family(model)
    return {"family": name, **_write_model[name](model)}


def _model_from_json(values: Any, _: type) -> Model:
    values = dict(values)
    name = values.pop("family", None)
    if name not in FAMILIES:
        raise UserError(f"model.family is {name!r}; it must be {' or '.join(FAMILIES)}")
    return _read_model[name](values, FAMILIES[name])


_converter.register_unstructure_hook_func(lambda kind: kind == Model or kind in FAMILIES.values(), _model_to_json)
_converter.register_structure_hook_func(lambda kind: kind == Model, _model_from_json)


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
    """Descriptions such as "d_model 64 -> 128" of the dotted fields in `names` that differ.

    The name "model" stands for all fields of the model but those that may change (see `fixed_fields`).
    """
    dotted = [each for name in names for each in (_model_fields(old) if name == "model" else [name])]
    changes = []
    for name in dotted:
        before, after = old, new
        for part in name.split("."):
            before, after = getattr(before, part), getattr(after, part)
        if before != after:
            changes.append(f"{name.rsplit('.', 1)[-1]} {before} -> {after}")
    return changes


def _model_fields(config: RunConfig) -> list[str]:
    return [f"model.{name}" for name in fixed_fields(config.model)]
