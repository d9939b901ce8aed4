"""The tables of docs/benchmarks.md, from benchmarks/results/peers.json and overhead.json."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from report import load, table, where

PEERS = {"torchdeq": "TorchDEQ", "jaxopt": "jaxopt", "optimistix": "optimistix", "scipy": "scipy"}
Row = dict[str, Any]


def _power(rtol: float) -> str:
    return f"{rtol:.0e}".replace("e-0", "e-")


def fewest(row: Row, library: str) -> int | None:
    """Evaluations of the solver of a library that needs the fewest."""
    found = [c["evaluations"] for c in row["contenders"].values() if c["library"] == library and c["reached"]]
    return min((count for count in found if count is not None), default=None)


def ours(row: Row) -> list[str]:
    """Time, evaluations and setting of this library's fastest."""
    best = row["best"].get("equilibria")
    if best is None:
        return ["not reached", "–", "–"]
    c = row["contenders"][best]
    return [f"{c['milliseconds']:.3g}", str(fewest(row, "equilibria")), f"`{best.removeprefix('equilibria ')}`"]


def theirs(row: Row, library: str) -> str:
    """Time of a peer's fastest relative to ours, and its fewest evaluations."""
    those = [c for c in row["contenders"].values() if c["library"] == library]
    if not those:
        return "–"
    if library not in row["best"]:
        share = max(c["share"] for c in those)
        return f"not reached ({share:.0%})" if share < 1 else "not reached"
    if library not in row["ratios"]:
        return "reached"
    count = fewest(row, library)
    ratio = f"{row['ratios'][library]:.2f}"
    return (f"**{ratio}**" if row["ratios"][library] < 1 else ratio) + (f" · {count}" if count else "")


def solves() -> str:
    result = load("peers")
    head = ["problem", "to", "ours (ms)", "evals", "our fastest", *PEERS.values()]
    rows = [[r["problem"], _power(r["rtol"]), *ours(r), *(theirs(r, peer) for peer in PEERS)] for r in result["solve"]]
    return table(head, rows)


def gradients() -> str:
    result = load("peers")
    peers = [peer for peer in PEERS if peer != "scipy"]
    head = ["problem", "to", "ours (ms)", "evals", "our fastest", *(PEERS[peer] for peer in peers)]
    rows = [[r["problem"], _power(r["rtol"]), *ours(r), *(theirs(r, peer) for peer in peers)] for r in result["gradient"]]
    return table(head, rows)


KINDS: dict[str, Callable[[Row], bool]] = {
    "small maps, d 64": lambda row: " d 64" in row["problem"],
    "maps, d 256 and 1024": lambda row: any(size in row["problem"] for size in (" d 256", " d 1024")),
    "Transformer blocks": lambda row: "block" in row["problem"],
    "all": lambda row: True,
}  # fmt: skip


def geometric(values: Iterable[float]) -> str:
    logs = [math.log(value) for value in values]
    return f"{math.exp(sum(logs) / len(logs)):.2f} ({len(logs)})" if logs else "–"


def means() -> str:
    """Geometric means of the ratios over the rows that both reached, with their number."""
    result = load("peers")
    lines = []
    for part, what in (("solve", "solve"), ("gradient", "solve and backward")):
        for kind, belongs in KINDS.items():
            rows = [r for r in result[part] if belongs(r)]
            cells = [geometric(r["ratios"][peer] for r in rows if peer in r["ratios"]) for peer in PEERS]
            lines.append([f"{what}, {kind}", *cells])
    for part, what in (("solve", "solve"), ("gradient", "solve and backward")):
        rows = result[part]
        for name, counted in (
            ("rows slower here", lambda row, peer: row["ratios"].get(peer, 1.0) < 1.0),
            ("rows the peer did not reach", lambda row, peer: _ran(row, peer) and peer not in row["best"]),
            ("rows only the peer reached", lambda row, peer: peer in row["best"] and "equilibria" not in row["best"]),
        ):
            cells = [str(sum(counted(r, peer) for r in rows)) for peer in PEERS]
            lines.append([f"{what}, {name} (of {len(rows)})", *cells])
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return table(["", *PEERS.values()], lines) + f"\n\nMeasured on {where(result)}; {versions}."


def _ran(row: Row, library: str) -> bool:
    return any(c["library"] == library for c in row["contenders"].values())


def counts() -> str:
    """Rows in which a peer's least number of evaluations is below ours."""
    lines = []
    for row in load("peers")["solve"]:
        mine = fewest(row, "equilibria")
        least = {PEERS[peer]: count for peer in PEERS if (count := fewest(row, peer)) is not None and peer != "scipy"}
        if not least or mine is None:
            continue
        name, count = min(least.items(), key=lambda item: item[1])
        if count < mine:
            lines.append([row["problem"], _power(row["rtol"]), str(mine), f"{count} ({name})"])
    return table(["problem", "to", "ours", "fewest of a peer"], lines) if lines else "No peer needs fewer in any row."


def overhead() -> str:
    result = load("overhead")
    lines = []
    for row in [*result["rows"], *result.get("maps", [])]:
        solvers = row["solvers"]
        if "d_model" in row:
            what = f"block, d_model {row['d_model']}, length {row['length']}, memory {row['memory']}, batch {row['batch']}"
        else:
            what = f"tanh, d {row['d']}, batch {row['batch']}"
        lines.append([what, *(_overhead(s) for s in solvers.values())])
    names = [f"`{name}`" for name in next(iter(result["rows"]))["solvers"]]
    return table(["map", *names], lines) + f"\n\nMeasured on {where(result)}."


def _overhead(solver: dict[str, float]) -> str:
    return f"{solver['overhead']:.2f} ({solver['ms_per_f']:.2f} + {solver['ms_added_per_step']:.2f})"
