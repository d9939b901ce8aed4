"""The tables of docs/growth.md: what generation costs, and how time and memory grow."""

from __future__ import annotations

from typing import Any

from report import load, table, where

WAYS = {
    "twin": "explicit twin, with its cache",
    "anderson": "cache, `Anderson()`",
    "broyden": "cache, `Broyden()`",
    "picard": "cache, `Picard()`",
    "full": "full re-solve, `Anderson()`",
}


def generation() -> str:
    """Tokens per second, by model and batch, and by way; with the evaluations of one position."""
    result = load("generation")
    rows = []
    for way, name in WAYS.items():
        cells = []
        for row in result["rows"]:
            speed, found = row["tokens_per_second"], row["positions"].get(way)
            solver = row["positions"]["anderson"] if way == "full" else found
            if solver is not None and solver["solved"] < 1:  # fast, but not at the answer
                cells.append(f"{solver['solved']:.0%} solved")
                continue
            ratio = f" ({speed[way] / speed['twin']:.2f})" if way != "twin" else ""
            cells.append(f"{speed[way]:,.0f}{ratio}" + ("" if found is None else f" · {found['evaluations']:.1f}"))
        rows.append([name, *cells])
    head = [f"{row['model']}, batch {row['batch']}" for row in result["rows"]]
    worst = max(value for row in result["rows"] for value in row["logit_difference"].values())
    return (
        table(["tokens/s (over the twin's) · evaluations", *head], rows)
        + f"\n\nThe twin has {result['twin_depth']} layers; rtol {result['tolerance']['rtol']:g}, at most "
        f"{result['tolerance']['max_evals']} evaluations. Logits with and without the cache differ by {worst:.0e} at most, "
        f"relative, in float64. Measured on {where(result)}."
    )


def growth() -> str:
    """Exponents of time and memory."""
    result = load("growth")
    rows = []
    for name, row in result["rows"].items():
        sizes = row["sizes"]
        rows.append([name, f"{sizes[0]} … {sizes[-1]}", *fit(row, "time", "ms"), *fit(row, "memory", "mib")])
    usual = ", ".join(f"{name} {value}" for name, value in result["usual"].items())
    head = ["", "sizes", "ms", "time ∝ size^", "R²", "MiB", "memory ∝ size^", "R²"]
    batch, width = result["history_state"]
    return table(head, rows) + (
        f"\n\nWhat is not varied: {usual}; histories: one step less its f, states of {width} numbers, batch {batch}. "
        f"Measured on {where(result)}."
    )


def fit(row: dict[str, Any], kind: str, values: str) -> list[str]:
    if kind not in row:
        return ["–", "–", "–"]
    first, last = row[values][0], row[values][-1]
    flat = last < 1.05 * first
    return [f"{first:.3g} … {last:.3g}", f"{row[kind]['exponent']:.2f}", "–" if flat else f"{row[kind]['r2']:.3f}"]
