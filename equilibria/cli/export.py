"""`equilibria export`: the model of a run as a folder that Hugging Face Transformers loads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from transformers.utils import logging

from equilibria.cli.load import load_run
from equilibria.cli.parse import parse
from equilibria.data import Tokenizer
from equilibria.data.disk import refuse_existing
from equilibria.interop.huggingface.run import from_run, write_export
from equilibria.train.run_folder import open_run


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Options of `equilibria export`."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of the run (its twin is in RUN/twin)."""
    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """Folder to write; it must not exist."""
    data_dir: Path | None = None
    """Folder with the text of a run that was converted without it, for the tokenizer; without, the folder has none."""


def export_command(argv: Sequence[str]) -> int:
    """Run `equilibria export` and print what was written."""
    options = parse(
        ExportOptions,
        argv,
        command="equilibria export",
        description="Write the best weights of a run, its tokenizer and a model card as a folder for Hugging Face "
        "Transformers: AutoModelForCausalLM.from_pretrained(FOLDER).",
    )
    logging.disable_progress_bar()  # of files that are written in no time
    print(export(options))
    return 0


def export(options: ExportOptions) -> str:
    """Write the folder and return what the command prints; a UserError leaves nothing behind."""
    refuse_existing(options.folder)
    run = open_run(options.run)
    config = run.load_config()
    tokenizer = _tokenizer(options)
    model = from_run(options.run)
    theirs = write_export(options.folder, model, tokenizer, run, config)
    lines = [f"{options.folder}: {type(model).__name__}, {sum(p.numel() for p in model.parameters()):,} parameters"]
    if theirs is None:
        lines.append("  tokenizer  none, since it is the corpus's; with --data-dir FOLDER the export has one")
    elif theirs.pad_token is None:
        lines.append("  padding    no token is free for it; set tokenizer.pad_token to one of the text's for batches")
    lines.append('next: import equilibria.interop.huggingface, then AutoModelForCausalLM.from_pretrained("FOLDER")')
    return "\n".join(lines).replace('FOLDER")', f'{options.folder}")')


def _tokenizer(options: ExportOptions) -> Tokenizer | None:
    if options.data_dir is None and not open_run(options.run).tokenizer.is_dir():
        return None
    return load_run(options.run, options.data_dir).tokenizer
