"""`equilibria data`: list, fetch and check the data sets, show a text of one's own, clear the cache."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from equilibria.cli.parse import parse
from equilibria.data.byte_pair import BytePair
from equilibria.data.cache import DAY, cache_folder
from equilibria.data.corpora import data_set_folder
from equilibria.data.corpus import Corpus
from equilibria.data.kept import kept_things
from equilibria.data.published import DATA_SETS, find_data_set
from equilibria.data.store import get, verify
from equilibria.recipes.build import build_corpus
from equilibria.solution import UserError
from equilibria.train.checks import check_not_negative
from equilibria.train.config import DataConfig

USAGE = """\
usage: equilibria data list | get NAME | verify NAME | show | clear

  list           the data sets, and which are here
  get NAME       fetch one into the cache, or take it out of an archive (--from FILE)
  verify NAME    check its files, and count its tokens and words
  show           what a model would be trained on: documents, splits and tokens of a folder or a data set
                 (--data-dir FOLDER, --dataset NAME, --corpus NAME); a large text is then ready to train on
  clear          what the cache holds that can be made again; with --yes, delete it

The cache is {cache}; the environment variable EQUILIBRIA_CACHE moves it.
"""


@dataclass(frozen=True, kw_only=True)
class GetOptions:
    """Options of `equilibria data get`."""

    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")]
    """Data set; `equilibria data list` shows them."""
    archive: Annotated[Path | None, tyro.conf.arg(name="from", metavar="FILE")] = None
    """Archive that you fetched yourself, in place of the network."""


@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """Options of `equilibria data verify`."""

    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")]
    """Data set; `equilibria data list` shows them."""
    data_dir: Path | None = None
    """Folder with its files; by default the cache."""


@dataclass(frozen=True, kw_only=True)
class ShowOptions:
    """Options of `equilibria data show`."""

    data: Annotated[DataConfig, tyro.conf.arg(name="")] = field(default_factory=lambda: DataConfig(corpus="text"))
    """The same as those of `equilibria train`."""


@dataclass(frozen=True, kw_only=True)
class ClearOptions:
    """Options of `equilibria data clear`."""

    unused_days: float = 0.0
    """Leave what was used in the last so many days."""
    data_sets: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Also the data sets that `equilibria data get` put there."""
    yes: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Delete; without it, only what would be deleted is shown."""

    def __post_init__(self) -> None:
        check_not_negative(self, "unused_days")


def data_command(argv: Sequence[str]) -> int:
    """Run `equilibria data`: results go to standard output, what is happening to standard error."""
    action, *rest = argv or ("--help",)
    if action in ("-h", "--help", "help"):
        print(USAGE.format(cache=cache_folder()), end="")
    elif action == "list":
        if rest:
            raise UserError(f"equilibria data list takes no {' '.join(rest)}")
        _list()
    elif action == "get":
        options = parse(GetOptions, rest, command="equilibria data get", description="Fetch a data set into the cache.")
        print(get(find_data_set(options.name), options.archive, note=_say))
    elif action == "verify":
        options = parse(
            VerifyOptions, rest, command="equilibria data verify", description="Check the files and tokens of a data set."
        )
        verify(find_data_set(options.name), options.data_dir, note=print)
    elif action == "show":
        options = parse(
            ShowOptions,
            rest,
            command="equilibria data show",
            description="Show the documents, the splits and the tokens of a text before training on it.",
            default=ShowOptions(),
        )
        _show(build_corpus(options.data, note=_say))
    elif action == "clear":
        options = parse(
            ClearOptions,
            rest,
            command="equilibria data clear",
            description="Show what the cache holds that can be made again, and delete it if asked to.",
        )
        _clear(options)
    else:
        raise UserError(f"equilibria data cannot {action}; choose list, get, verify, show or clear")
    return 0


def _list() -> None:
    width = max(map(len, DATA_SETS))
    for data_set in DATA_SETS.values():
        here = data_set_folder(data_set.name).is_dir()
        state = "here" if here else f"not here, {data_set.download} to fetch"
        tokens = " / ".join(f"{count:,}" for count in data_set.counts)
        print(f"{data_set.name:{width}}  {data_set.title} ({state})")
        print(f"{'':{width}}  {tokens} tokens, {data_set.vocabulary:,} symbols; {data_set.licence}")
    print(f"\ncache: {cache_folder()}")


def _show(corpus: Corpus) -> None:
    tokenizer = corpus.tokenizer
    print(f"{'':8}{'documents':>12}{'bytes':>18}{'tokens':>16}{'bytes per token':>18}")
    splits = {"train": corpus.train, "valid": corpus.valid, "test": corpus.test}
    for name, split in splits.items():
        documents, size, mean = split.documents, split.text_bytes, split.bytes_per_token
        cells = ("" if documents is None else f"{documents:,}", "" if size is None else f"{size:,}")
        per_token = "" if mean is None else f"{mean:.2f}"
        print(f"{name:8}{cells[0]:>12}{cells[1]:>18}{split.tokens.numel():>16,}{per_token:>18}")
    end = tokenizer.end_of_text if isinstance(tokenizer, BytePair) else None
    between = f", with {end} between documents" if end else ""
    print(f"\nvocabulary of {tokenizer.size:,} {tokenizer.kind}{between}")
    for name, split in splits.items():
        if split.text_bytes is not None:
            print(f"{name} begins {tokenizer.decode(split.tokens[:24].tolist())!r}")


def _clear(options: ClearOptions) -> None:
    before = time.time() - options.unused_days * DAY
    things = [kept for kept in kept_things(data_sets=options.data_sets) if kept.used <= before]
    total = 0
    for kept in things:
        size, days = kept.size, max(0.0, time.time() - kept.used) / DAY
        total += size
        print(f"{size / 2**20:>12,.1f} MiB  {kept.what:<15}  unused for {days:,.0f} days  {kept.path}")
        if options.yes:
            kept.remove()
    if not things:
        print(f"there is nothing to delete in {cache_folder()}")
    elif options.yes:
        print(f"{total / 2**20:>12,.1f} MiB  deleted")
    else:
        print(f"{total / 2**20:>12,.1f} MiB  in all; to delete it, add --yes")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
