"""`equilibria convert`: a checkpoint of the original code becomes a run, to evaluate and to generate with."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from equilibria.cli.parse import parse
from equilibria.data import Corpus
from equilibria.data.disk import refuse_existing, sha256, write_folder
from equilibria.data.word_ids import ORIGINAL_STYLES
from equilibria.interop.original.checkpoint import read_checkpoint
from equilibria.interop.original.configuration import Configuration, configure
from equilibria.interop.original.names import family, release, translate
from equilibria.interop.original.options import MODELS, OriginalOptions, show
from equilibria.models.deq_transformer import TransformerShape
from equilibria.recipes.build import build_corpus, build_model
from equilibria.solution import UserError
from equilibria.train.checkpoint import save_checkpoint
from equilibria.train.config import DataConfig, OptimConfig, RunConfig, SolveConfig, TransformerModel, TrellisModel
from equilibria.train.run_folder import RunFolder
from equilibria.train.whole import whole_weights

ConvertibleCorpus = Literal[
    "wikitext-103", "wikitext-2", "penn-treebank", "penn-treebank-char", "enwik8", "text8", "copy-memory"
]
WORDS: dict[int, ConvertibleCorpus] = {267735: "wikitext-103", 33278: "wikitext-2", 10000: "penn-treebank"}
"""Size of a vocabulary -> the corpus that has it."""


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """Options of `equilibria convert`."""

    original: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="ORIGINAL")]
    """File that the original's save_weights wrote: torch.save(model.state_dict())."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Folder of the run to make; it must not exist."""
    corpus: ConvertibleCorpus | None = None
    """Text that the model was trained on; None: the one with a vocabulary of this size, or else wikitext-103."""
    data_dir: Path | None = None
    """Folder with the files of the corpus, whose tokenizer the run then has, for `equilibria generate`."""
    as_released: bool = True
    """Further training keeps the original's slips: dropout of the Transformer's output zeroes whole positions, no attention
    weight is dropped in 2019, and the last word of a TrellisNet's vocabulary does not learn as an input. Evaluation is the
    same either way."""
    model: OriginalOptions = field(default_factory=OriginalOptions)


def convert_command(argv: Sequence[str]) -> int:
    """Run `equilibria convert` and print what was found and what was assumed."""
    options = parse(
        ConvertOptions,
        argv,
        command="equilibria convert",
        description="Turn a checkpoint of the code released with Deep Equilibrium Models (2019, 2021) into a run. "
        "What its tensors do not tell is given by options, spelled as in the original's training scripts.",
    )
    print(convert(options))
    return 0


def convert(options: ConvertOptions) -> str:
    """Write the run and return what the command prints; a UserError leaves nothing behind."""
    refuse_existing(options.out)
    tensors = read_checkpoint(options.original)
    try:
        found = configure(translate(tensors), options.model, release=release(tensors), as_released=options.as_released)
    except ValueError as error:
        raise UserError(f"{options.original} cannot be converted: {error}") from error
    config = _run_config(found, options)
    text = _text(config.data, found.n_token)
    model = build_model(config, found.n_token)
    model.load_state_dict(found.tensors)

    def fill(folder: Path) -> None:
        run = RunFolder(folder)
        run.store_config(config)
        about = {"vocab_size": found.n_token, "original_sha256": sha256(options.original)}
        save_checkpoint(run.best, about, model=whole_weights(model))
        if text is not None:
            run.tokenizer.mkdir()
            text.tokenizer.save(run.tokenizer)
        refuse_existing(options.out)  # nor may it have come up meanwhile, for it would be replaced

    write_folder(options.out, fill)
    rounded = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values() if tensor.element_size() > 4}
    count = sum(parameter.numel() for parameter in model.parameters())
    what = f"{MODELS[family(tensors)]} of {release(tensors)}, {count:,} parameters"
    return _report(options, what, found, config.data.corpus, has_text=text is not None, rounded=sorted(rounded))


def _run_config(found: Configuration, options: ConvertOptions) -> RunConfig:
    """With Broyden's method and, in training, the thresholds of the original. Evaluation solves to near float32's end."""
    kind = TransformerModel if isinstance(found.shape, TransformerShape) else TrellisModel
    values: dict[str, Any] = {item.name: getattr(found.shape, item.name) for item in dataclasses.fields(found.shape)}
    corpus = options.corpus or WORDS.get(found.n_token, "wikitext-103")
    folder = None if options.data_dir is None else options.data_dir.absolute()  # it must hold wherever the run is used
    return RunConfig(
        recipe="converted",
        model=kind(**values),
        solver=SolveConfig(
            method="broyden", history=50, rtol=0.0, atol=1e-6, max_evals=51, backward_rtol=1e-6, backward_max_evals=81,
            eval_rtol=1e-5, eval_atol=0.0, eval_max_evals=150,
        ),
        data=DataConfig(corpus=corpus, data_dir=folder, original_vocabulary=corpus in ORIGINAL_STYLES),
        optim=OptimConfig(length=found.length),
        twin=False,
        eval_batch_size=4,
    )  # fmt: skip


def _text(data: DataConfig, n_token: int) -> Corpus | None:
    """The corpus in --data-dir, which must have the vocabulary of the checkpoint; None without one."""
    if data.data_dir is None:
        return None
    corpus = build_corpus(data)
    if corpus.tokenizer.size != n_token:
        raise UserError(
            f"{data.corpus} in {data.data_dir} has a vocabulary of {corpus.tokenizer.size:,}, but the tensors have n_token "
            f"{n_token:,}; give --corpus and --data-dir of the text that the model was trained on"
        )
    return corpus


def _report(
    options: ConvertOptions, what: str, found: Configuration, corpus: str, *, has_text: bool, rounded: list[str]
) -> str:
    lines = [
        f"{options.out}: {what}, from {options.original}",
        f"  found      {_list(found.found)}",
        f"  assumed    {_list(found.assumed)}",
    ]
    if found.assumed:
        lines.append("             options of these names say otherwise (see equilibria convert --help)")
    known = "has as many words" if found.n_token in WORDS else "assumed; --corpus says otherwise"
    lines.append(f"  corpus     {corpus}" + ("" if options.corpus else f" ({known})"))
    if not has_text:
        lines.append("  tokenizer  none, since it is the corpus's; with --data-dir FOLDER the run has one")
    if rounded:
        lines.append(f"  rounded    from {', '.join(rounded)} to float32")
    where = "" if has_text else " --data-dir FOLDER"
    return "\n".join([*lines, f"next: equilibria eval {options.out}{where}"])


def _list(values: dict[str, object]) -> str:
    return ", ".join(f"{name} {show(value) if value != () else 'none'}" for name, value in values.items()) or "nothing"
