"""`equilibria train`: choose the run folder and configuration, train the model and its twin, and report."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from equilibria.cli.artefacts import finish
from equilibria.cli.job import job
from equilibria.cli.load import check_vocabulary, with_own_tokenizer
from equilibria.cli.parse import parse
from equilibria.data import Corpus, SequenceSplit
from equilibria.models import start_from_frequencies
from equilibria.recipes import RECIPES, scaled
from equilibria.recipes.build import build_corpus, build_model
from equilibria.solution import UserError
from equilibria.train.checkpoint import load_weights
from equilibria.train.config import FIXED_ON_RESUME, RunConfig, changed_fields
from equilibria.train.distributed import ALONE, Ranks
from equilibria.train.interrupt import Interrupted, StopRequest, StopTogether
from equilibria.train.loop import Trainer
from equilibria.train.memory import keep_freed_memory
from equilibria.train.parallel import as_launched
from equilibria.train.run_folder import RunFolder, create_run, newest_run, open_run
from equilibria.train.shown import shown_path
from equilibria.train.trackers import check_trackers
from equilibria.train.typed import add_command
from equilibria.train.whole import load_whole_weights


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Options of `equilibria train RECIPE`."""

    config: Annotated[RunConfig, tyro.conf.arg(name="")]
    """What the recipe sets."""
    scale: float = 1.0
    """Multiply the recipe's widths, batch and numbers of steps by this, before the other options."""
    load: Path | None = None
    """Begin with the model of another run and its best weights, such as one that `equilibria convert` made."""
    run_dir: Path | None = None
    """Folder of the run; None: runs/RECIPE, runs/RECIPE-2, ..."""
    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Continue the run in --run-dir, or the newest of this recipe, with the configuration stored there."""


def train_command(argv: Sequence[str]) -> int:
    """Run `equilibria train`, in all processes of a job."""
    with job() as ranks:
        return _train_command(argv, ranks)


def _train_command(argv: Sequence[str], ranks: Ranks) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        if ranks.is_main:
            print(_recipes_help())
        return 0
    recipe, rest = argv[0], argv[1:]
    if recipe not in RECIPES:
        close = [name for name in RECIPES if name.startswith(recipe)] or difflib.get_close_matches(recipe, RECIPES, n=1)
        hint = f"did you mean {' or '.join(close)}?" if close else f"choose {', '.join(RECIPES)}"
        raise UserError(f"there is no recipe {recipe}; {hint} (see equilibria train)")
    scale = _scale(rest)
    default = scaled(RECIPES[recipe](), scale)
    if load := _value(rest, "--load"):
        default = _with_model_of(ranks.from_main(lambda: open_run(Path(load)).load_config()), default)
    options = _parse(recipe, rest, default)
    folder = None
    if options.resume:
        folder, stored = ranks.from_main(lambda: _stored_run(recipe, options.run_dir))
        if scale != 1 and options.config.model != stored.model:
            raise UserError(f"a resumed run keeps its size, which is not that of --scale {scale:g}; leave --scale out")
        options = dataclasses.replace(_parse(recipe, rest, stored), load=None)  # the checkpoint has the weights
        options = dataclasses.replace(options, config=_with_absolute_paths(options.config))
        if changes := changed_fields(stored, options.config, FIXED_ON_RESUME):
            raise UserError(
                f"a resumed run cannot change {', '.join(changes)}: the checkpoint depends on it; "
                "leave that option out, or leave --resume out to start a new run"
            )
    config = as_launched(_with_absolute_paths(options.config))
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    check_trackers(config.trackers)
    keep_freed_memory()
    data = config.data if folder is None else with_own_tokenizer(config.data, folder)
    with ranks.main_first("corpus"):
        corpus = build_corpus(data, note=_note if ranks.is_main else lambda line: None)
    if options.load is not None:
        other = RunFolder(options.load)
        ranks.from_main(lambda: check_vocabulary(other, corpus, config.data))
    if folder is None:
        folder = ranks.from_main(lambda: create_run(recipe, options.run_dir))
    with StopRequest(quiet=not ranks.is_main) as stop:
        try:
            with _held(folder, ranks):
                _train_all(config, corpus, folder, stop, options.load, ["equilibria", "train", *argv], ranks)
        except Interrupted:
            if ranks.is_main:
                command = f"equilibria train {recipe} --resume --run-dir {shlex.quote(shown_path(folder.path))}"
                print(f"stopped; everything is saved. Continue with: {command}", file=sys.stderr)
        except UserError:
            if ranks.is_main:
                with contextlib.suppress(OSError):  # a run that never began leaves no folder; one with files stays
                    folder.path.rmdir()
            raise
    return 0


@contextlib.contextmanager
def _held(folder: RunFolder, ranks: Ranks) -> Iterator[None]:
    """The first process holds the folder for the job."""
    with contextlib.ExitStack() as stack:
        ranks.from_main(lambda: stack.enter_context(folder.held()))
        yield


def _train_all(
    config: RunConfig,
    corpus: Corpus,
    folder: RunFolder,
    stop: StopRequest,
    load: Path | None,
    typed: Sequence[str],
    ranks: Ranks,
) -> None:
    if ranks.is_main:
        processes = "" if ranks.count == 1 else f", {ranks.count} processes"
        print(
            f"{config.recipe}: {corpus.train.tokens.numel():,} training tokens, vocabulary {corpus.tokenizer.size:,} "
            f"-> {shown_path(folder.path)}{processes}",
            file=sys.stderr,
            flush=True,
        )
    label = "DEQ" if config.model.depth is None else "stack"
    trained = train_model(config, corpus, folder, stop, label=label, load=load, typed=typed, ranks=ranks)
    if config.wants_twin:
        StopTogether(stop, ranks).check(at_once=True)
        last_step = trained.state.step
        twin = config.for_twin()
        train_model(twin, corpus, folder.twin, stop, label="twin", last_step=last_step, load=load, ranks=ranks)
    ranks.close()
    if ranks.is_main:
        print(finish(config, corpus, folder, stop), flush=True)


def train_model(
    config: RunConfig,
    corpus: Corpus,
    folder: RunFolder,
    stop: StopRequest,
    *,
    label: str,
    last_step: int | None = None,
    load: Path | None = None,
    typed: Sequence[str] = (),
    ranks: Ranks = ALONE,
) -> Trainer:
    """Train one model in its folder, from the checkpoint there if there is one, else from the weights of the run `load`.

    `typed` is the command, which the folder keeps.
    """
    torch.manual_seed(config.seed)
    model = build_model(config, corpus.tokenizer.size)
    if config.start_from_frequencies:  # the weights of a run or a checkpoint, where there are any, write over it
        start_from_frequencies(model, _frequencies(corpus))
    if load is not None:
        weights = RunFolder(load).weights
        ranks.from_main(lambda: load_weights(weights, model))
        load_whole_weights(model, model.state_dict(), ranks)
    trainer = Trainer(model, corpus, config, folder, stop=stop, last_step=last_step, label=label, ranks=ranks)
    if ranks.is_main:
        folder.store_config(config)
        if typed:
            add_command(folder.command, typed)
        folder.tokenizer.mkdir(exist_ok=True)
        corpus.tokenizer.save(folder.tokenizer)
    trainer.run()
    return trainer


def _note(line: str) -> None:
    print(f"text: {line}", file=sys.stderr, flush=True)


def _frequencies(corpus: Corpus) -> torch.Tensor:
    """(V,) how often the model is asked for each token in training."""
    split, size = corpus.train, corpus.tokenizer.size
    tokens = split.targets if isinstance(split, SequenceSplit) else split.tokens
    # In pieces, so that a text that is kept on the disk is never whole in memory.
    return sum((torch.bincount(piece, minlength=size) for piece in tokens.flatten().split(1 << 24)), torch.tensor(0))


def _parse(recipe: str, argv: Sequence[str], default: RunConfig) -> TrainOptions:
    return parse(
        TrainOptions,
        argv,
        command=f"equilibria train {recipe}",
        description=_first_line(RECIPES[recipe].__doc__),
        default=TrainOptions(config=default),
    )


def _scale(argv: Sequence[str]) -> float:
    """The value of --scale."""
    with contextlib.suppress(TypeError, ValueError):  # what is no number, the parser proper will explain
        return float(_value(argv, "--scale"))  # pyright: ignore[reportArgumentType]
    return 1.0


def _value(argv: Sequence[str], option: str) -> str | None:
    """The last value of an option that must be known before the rest can be parsed, for it sets the defaults."""
    found = None
    for word, following in zip(argv, [*argv, None][1:], strict=True):
        name, given, value = word.partition("=")
        if name == option:
            found = value if given else following
    return found


def _with_model_of(stored: RunConfig, config: RunConfig) -> RunConfig:
    """The configuration with the model of another run, and words numbered as they are there."""
    data = dataclasses.replace(config.data, original_vocabulary=stored.data.original_vocabulary)
    return dataclasses.replace(config, model=stored.model, data=data)


def _with_absolute_paths(config: RunConfig) -> RunConfig:
    """The stored configuration must hold wherever the run is resumed from."""
    data = config.data
    names = {name: getattr(data.text, name) for name in ("dataset", "tokenizer")}  # of the Hub, where there is no such file
    here = {
        name: str(path.resolve()) for name, given in names.items() if given and (path := Path(given).expanduser()).exists()
    }
    data = dataclasses.replace(
        data,
        data_dir=None if data.data_dir is None else data.data_dir.resolve(),
        text=dataclasses.replace(data.text, **here),
    )
    return dataclasses.replace(config, data=data)


def _stored_run(recipe: str, run_dir: Path | None) -> tuple[RunFolder, RunConfig]:
    """The run to resume and its configuration."""
    folder = newest_run(recipe) if run_dir is None else open_run(run_dir)
    config = folder.load_config()
    if config.recipe not in RECIPES:
        raise UserError(
            f"{folder.path} was {config.recipe}, not trained by a recipe: there is no training to resume; "
            f"use: equilibria eval {folder.path}, or leave --resume out to start a new run"
        )
    if config.recipe != recipe:
        raise UserError(
            f"{folder.path} is a run of {config.recipe}, not of {recipe}; "
            f"use: equilibria train {config.recipe} --resume --run-dir {folder.path}"
        )
    return folder, config


def _recipes_help() -> str:
    recipes = "\n".join(f"  {name:<32}{_first_line(recipe.__doc__)}" for name, recipe in RECIPES.items())
    return (
        "usage: equilibria train RECIPE [options]\n\n"
        "Train a model and its explicit twin, evaluate both, and write everything into a run folder.\n\n"
        f"recipes\n{recipes}\n\n"
        "`equilibria train RECIPE --help` lists every option with the value that the recipe gives it.\n"
        "Ctrl-C stops cleanly; `equilibria train RECIPE --resume` continues."
    )


def _first_line(docstring: str | None) -> str:
    return (docstring or "").strip().splitlines()[0]
