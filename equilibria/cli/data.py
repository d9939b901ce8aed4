"""`equilibria data`: list, fetch and check the data sets."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from equilibria.cli.parse import parse
from equilibria.data.cache import cache_folder
from equilibria.data.corpora import data_set_folder
from equilibria.data.published import DATA_SETS, find_data_set
from equilibria.data.store import get, verify
from equilibria.solution import UserError

USAGE = """\
usage: equilibria data list | get NAME | verify NAME

  list           the data sets, and which are here
  get NAME       fetch one into the cache, or take it out of an archive (--from FILE)
  verify NAME    check its files, and count its tokens and words

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
    else:
        raise UserError(f"equilibria data cannot {action}; choose list, get or verify")
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


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
