"""`equilibria report`: one page on one run or several."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from equilibria.cli.parse import parse
from equilibria.solution import UserError
from equilibria.train.html import write_report
from equilibria.train.shown import shown_path


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Options of `equilibria report`."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN...]")]
    """Folders of runs."""
    out: Path | None = None
    """File to write; None: report.html, of one run in its folder, of several here."""


def report_command(argv: Sequence[str]) -> int:
    """Run `equilibria report`."""
    options = parse(
        ReportOptions, argv, command="equilibria report",
        description="Write one self-contained HTML page on runs: outcome, curves, convergence, comparison, configuration.",
    )  # fmt: skip
    if not options.runs:
        raise UserError("give the folder of at least one run (see equilibria report --help)")
    out = options.out
    if out is None:
        out = options.runs[0] / "report.html" if len(options.runs) == 1 else Path("report.html")
    if out.is_dir():
        raise UserError(f"--out {out} is a folder; give the name of a file, such as {out / 'report.html'}")
    write_report(options.runs, out)
    print(f"wrote {shown_path(out)}; open it in a browser", file=sys.stderr)
    return 0
