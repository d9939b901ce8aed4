"""The tables of docs/benchmarks.md on a step of a language model, from benchmarks/results/language_model_step.json."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from report import load, table, where

NAME = "language_model_step"
Row = dict[str, Any]


def steps() -> str:
    """Ours and the ratio to each peer, by size and by what was held equal."""
    result = load(NAME)
    lines = []
    for size, measured in result["sizes"].items():
        for what, timed in _compared(measured):
            mine = _row(timed, timed["best"]["equilibria"])
            lines.append([size, what, f"{mine['ms']:.0f}", _setting(mine, what), *(_peer(timed, p, what) for p in _PEERS)])
    head = ["d_model", "step", "ours (ms)", "our fastest", *_PEERS.values()]
    shapes = "; ".join(
        f"d_model {size}: {m['parameters'] / 1e6:.1f} M parameters, {m['shape']['vocab']:,} words, "
        f"batch {m['shape']['batch']}, "
        f"length {m['shape']['length']}, memory {m['shape']['memory']}, trained for {m['steps_trained']} steps"
        for size, m in result["sizes"].items()
    )
    return table(head, lines) + f"\n\n{shapes}. Measured on {where(result)}."


_PEERS = {"original": "original", "torchdeq": "TorchDEQ"}


def _compared(measured: Row) -> Iterator[tuple[str, Row]]:
    """What was held equal, and what was timed then."""
    if "evaluations" in measured:
        n = measured["evaluations"]["evaluations"]
        yield f"training, {n} + {n} evaluations", measured["evaluations"]["training"]
    if "dropout" in measured:
        n = measured["dropout"]["evaluations"]
        yield f"training, {n} + {n}, dropout {measured['dropout']['dropout']:g}", measured["dropout"]["training"]
    if "kept" in measured:
        n = measured["kept"]["evaluations"]
        yield f"training, {n} + {n}, freed memory kept", measured["kept"]["training"]
    for key, timed in measured.get("residual", {}).items():
        yield f"training, to {_power(key)}", timed["training"]
    if "evaluations" in measured:
        yield f"evaluation, {measured['evaluations']['evaluations']} evaluations", measured["evaluations"]["evaluation"]
    for key, timed in measured.get("residual", {}).items():
        yield f"evaluation, to {_power(key)}", timed["evaluation"]


def _power(key: str) -> str:
    return key.replace("e-0", "e-")


def _row(timed: Row, name: str) -> Row:
    return next(row for row in timed["rows"] if row["name"] == name)


def _setting(row: Row, what: str) -> str:
    """The solvers of a way, and where they differ from side to side what they spent."""
    forward, backward = row["name"].split(": ", 1)[1].split(" / ")
    training = what.startswith("training")
    solvers = f"{forward} / {backward}" if training else forward
    spent = f"{row['forward']} + {row['backward']}" if training else str(row["forward"])
    return f"{solvers}, {spent}" if " to " in what else solvers


def _peer(timed: Row, library: str, what: str) -> str:
    """Its fastest over ours; bold where it is faster."""
    if library not in timed["ratios"]:
        return "not reached"
    ratio = timed["ratios"][library]
    shown = f"**{ratio:.2f}**" if ratio < 1 else f"{ratio:.2f}"
    return f"{shown} · {_setting(_row(timed, timed['best'][library]), what)}"


def twins() -> str:
    """Ours over the explicit twin, by size; and the perplexities, where a twin was trained."""
    lines = []
    for size, measured in load(NAME)["sizes"].items():
        if "twin" not in measured:
            continue
        found = measured["twin"]
        counts = found["training"]["counts"]
        spent = f"{counts['forward']} + {counts['backward']}"
        lines.append([size, f"training, {found['rtol']:g}", *_times(found["training"]), spent, "–", "–"])
        for key, row in found["evaluation"].items():
            known = "perplexity" in row
            lines.append(
                [
                    size,
                    f"evaluation, {float(key):g}",
                    *_times(row),
                    f"{row['evaluations']:.1f}" if known else "–",
                    f"{row['perplexity']:.1f}" if known else "–",
                    f"{found['twin_perplexity']:.1f}" if known else "–",
                ]
            )
    head = ["d_model", "step, rtol", "ours (ms)", "twin (ms)", "ours / twin", "evaluations", "perplexity", "twin's"]
    notes = [
        f"d_model {size}: {m['twin']['depth']} layers, trained for {m['twin']['steps_trained']:,} steps"
        + ("" if "twin_perplexity" in m["twin"] else ", no twin")
        for size, m in load(NAME)["sizes"].items()
        if "twin" in m
    ]
    return table(head, lines) + f"\n\n{'; '.join(notes)}."


def _times(row: Row) -> list[str]:
    return [f"{row['equilibria_ms']:.0f}", f"{row['twin_ms']:.0f}", f"{row['ratio']:.2f}"]


def peaks() -> str:
    """Peak memory of a training step, and ours over each."""
    lines = []
    for size, measured in load(NAME)["sizes"].items():
        found = measured.get("memory", {}).get("peak_mib", {})
        mine = min((mib for name, mib in found.items() if name.startswith("equilibria")), default=0.0)
        lines += [[size, name, f"{mib:.0f}", f"{mine / mib:.2f}"] for name, mib in found.items()]
    return table(["d_model", "solvers, forward / backward", "peak (MiB)", "our least over it"], lines)
