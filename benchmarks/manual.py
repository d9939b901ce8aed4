"""Set the measured tables of the manual from benchmarks/results/*.json, so that no figure in them is typed by hand.

A table stands between <!-- NAME --> and <!-- end --> in a page under docs/.

    python benchmarks/manual.py
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import step_tables
from growth_tables import generation, growth
from peers import tables as peers
from report import load, table, where

DOCS = Path(__file__).parents[1] / "docs"


def count(found: int | None) -> str:
    return "–" if found is None else str(found)


def solvers() -> str:
    """Evaluations until all samples are solved, to 1e-3 and to 1e-6, by problem and solver."""
    result = load("choosing")
    rows = []
    for name, row in result["solvers"].items():
        cells = []
        least = {r: min((s[r]["all"] or 10**9) for s in row["solvers"].values()) for r in ("1e-03", "1e-06")}
        for found in row["solvers"].values():
            parts = [
                f"**{count(found[r]['all'])}**" if found[r]["all"] == least[r] else count(found[r]["all"]) for r in least
            ]
            cells.append(" / ".join(parts))
        rows.append([name, f"{row['radius']:.2f}", *cells])
    names = [f"`{name}`" for name in next(iter(result["solvers"].values()))["solvers"]]
    return table(["problem", "ρ", *names], rows) + f"\n\nMeasured on {where(result)}; budget {result['budget']}."


def overhead() -> str:
    """Milliseconds that a solver adds to an evaluation, by problem and solver."""
    result = load("choosing")["solvers"]
    rows = [
        [name, f"{row['f_ms']:.2f}", *(f"+ {s['added_ms']:.2f}" for s in row["solvers"].values())]
        for name, row in result.items()
    ]
    return table(["problem", "one f", *(f"`{name}`" for name in next(iter(result.values()))["solvers"])], rows)


def adjoints() -> str:
    """Error, cost and memory, by adjoint and problem."""
    result = load("choosing")["adjoints"]
    rows = []
    for name in next(iter(result.values()))["adjoints"]:
        found = [problem["adjoints"][name] for problem in result.values()]
        rows.append(
            [adjoint(name), *(f"{f['error']:.0e} · {max(0.0, f['cost']):.0f} · {f['held_states']:,.0f}" for f in found)]
        )
    return table(["error · cost · held", *(f"{name}, ρ {row['radius']:.2f}" for name, row in result.items())], rows)


def adjoint(name: str) -> str:
    code, _, note = name.partition(" ")
    return f"`{code}` {note}".strip()


def torchdeq() -> str:
    result = load("torchdeq")
    return table(
        ["", "TorchDEQ", "equilibria"], [[row["what"], row["torchdeq"], row["equilibria"]] for row in result["rows"]]
    )


TABLES: dict[str, dict[str, Callable[[], str]]] = {
    "choosing.md": {"solvers": solvers, "overhead": overhead, "adjoints": adjoints},
    "migrating/torchdeq.md": {"torchdeq": torchdeq},
    "growth.md": {"generation": generation, "growth": growth},
    "benchmarks.md": {
        "means": peers.means,
        "solves": peers.solves,
        "counts": peers.counts,
        "gradients": peers.gradients,
        "overhead": peers.overhead,
        "steps": step_tables.steps,
        "twins": step_tables.twins,
        "peaks": step_tables.peaks,
    },
}


def filled(text: str, tables: dict[str, Callable[[], str]]) -> str:
    """The page with its tables set anew."""
    for name, make in tables.items():
        text, found = re.subn(
            rf"(<!-- {name} -->\n).*?(<!-- end -->)", lambda match, make=make: f"{match[1]}\n{make()}\n\n{match[2]}", text,
            flags=re.DOTALL,
        )  # fmt: skip
        if found != 1:
            raise ValueError(f"there are {found} places for {name}; a page has one, <!-- {name} --> ... <!-- end -->")
    return text


def main() -> None:
    for page, tables in TABLES.items():
        path = DOCS / page
        path.write_text(filled(path.read_text(encoding="utf-8"), tables), encoding="utf-8")
        print(f"wrote docs/{page}")


if __name__ == "__main__":
    main()
