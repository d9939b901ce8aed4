"""Builds the page: one file that needs no network and no script."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from equilibria.data.disk import write_text
from equilibria.train.html import tables
from equilibria.train.html.drawing import Drawing
from equilibria.train.html.figures import convergence, curves
from equilibria.train.html.reading import RunView, read_runs


def write_report(paths: Sequence[Path], out: Path) -> None:
    """Write the page of the runs in these folders; UserError for a folder that is none."""
    html = render(read_runs(paths))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, html)


def render(runs: Sequence[RunView]) -> str:
    """The page as HTML."""
    here = jinja2.PackageLoader("equilibria.train", "html")
    environment = jinja2.Environment(
        loader=here, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    drawn = [drawing for run in runs if (drawing := convergence(run))]
    heads, lines = tables.comparison(runs)
    texts = [(run.get("data.corpus"), run.get("data.data_dir"), run.get("data.vocab_size")) for run in runs]
    return environment.get_template("page.html").render(
        runs=[_run(run) for run in runs],
        several=len(runs) > 1,
        unlike=len(set(texts)) > 1,
        heads=heads,
        lines=lines,
        curves=[_figure(drawing, f"c{index}") for index, drawing in enumerate(curves(runs))],
        convergence=[_figure(drawing, f"t{index}") for index, drawing in enumerate(drawn)],
        differences=tables.differences(runs),
        colours=8,
        made=time.strftime("%Y-%m-%d %H:%M"),
    )


def _run(run: RunView) -> dict[str, Any]:
    return {
        "name": run.name,
        "recipe": run.get("recipe", ""),
        "path": str(run.path),
        "model": tables.model_name(run),
        "state": tables.state(run),
        "outcome": tables.outcome(run),
        "tiles": tables.tiles(run),
        "twin": run.twin is not None,
        "has_rows": bool(run.rows),
        "groups": tables.groups(run),
        "command": run.command,
        "advice": [
            {**dataclasses.asdict(advice), "remedy": tables.remedy_parts(advice.remedy)}
            for advice in (*run.advice, *(run.twin.advice if run.twin else ()))
        ],
        "failures": [*run.failures, *(run.twin.failures if run.twin else ())],
        "sample": run.sample,
    }


def _figure(drawing: Drawing, name: str) -> dict[str, Any]:
    return {
        "title": drawing.title,
        "unit": drawing.unit,
        "note": drawing.note,
        "entries": drawing.keys,
        "svg": drawing.svg(name),
    }
