"""Write docs/results.md from benchmarks/results/*.json, so that no figure in it is typed by hand.

python benchmarks/report.py
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from harness import RESULTS

PAGE = Path(__file__).parents[1] / "docs" / "results.md"


def load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def where(result: dict[str, Any]) -> str:
    m = result["machine"]
    threads = f"{m['threads']} threads" if m["threads"] > 1 else "1 thread"
    return f"{m['processor']}, {threads}, torch {m['torch']}, Python {m['python']}"


PAPER = {
    "penn-treebank-trellisnet-small": "The paper's DEQ-TrellisNet of 24M parameters reaches 57.1 on the test split, its "
    "60-layer twin 57.0 (Bai et al. 2019, table 2).",
}


def language_models() -> str:
    result = load("language_models")
    parts = []
    for recipe, models in result["recipes"].items():
        deq, twin = models["DEQ"], models["twin"]
        columns = (deq, twin)
        rows = [
            ["parameters", *(f"{m['parameters']:,}" for m in columns)],
            ["training tokens", *(f"{m['training_tokens']:,}" for m in columns)],
            ["validation perplexity", *(f"{m['valid_perplexity']:.2f}" for m in columns)],
            ["test perplexity", *(f"{m['test_perplexity']:.2f}" for m in columns)],
            ["training time, one thread (min)", *(f"{m['minutes']:.1f}" for m in columns)],
            ["peak memory of the process (MiB)", *(f"{m['peak_memory_mib']:,.0f}" for m in columns)],
            [
                "evaluations of f per solve, training, forward + backward",
                f"{deq['forward_evaluations']:.1f} + {deq['backward_evaluations']:.1f}",
                f"{result['twin_depth']} layers",
            ],
            ["evaluations of f per solve, test", f"{deq['test_evaluations']:.1f}", f"{result['twin_depth']} layers"],
            ["relative residual, end of training", f"{deq['final_training_residual']:.1e}", "–"],
            ["relative residual, test", f"{deq['test_residual']:.1e}", "–"],
            ["samples above the tolerance, test", f"{100 * deq['test_unconverged']:.1f} %", "–"],
        ]
        head = [recipe, "DEQ", f"explicit twin, {result['twin_depth']} layers"]
        commands = f"`{deq['command']}` and `{twin['command']}`, seed {deq['seed']}."
        note = deq.get("note")
        parts.append("\n\n".join(filter(None, (table(head, rows), commands, note, PAPER.get(recipe)))))
    return f"""## Language models and their explicit twins

Word level, `<eos>` after each line, whole validation and test splits, memory carried over the whole split. The twin is the
same block stacked, with the same parameters under the same names, the same recipe and the same training tokens. The budget
is small, minutes on a core: the figures compare models with their twins, not with models that saw the corpus many times.
Two runs were trained at a time on a machine that did other work as well: the times are rough.

```sh
python benchmarks/language_models.py --data-dir DIR
```

{chr(10).join(part + chr(10) for part in parts)}
Measured on {where(result)}.
"""


def copy_memory() -> str:
    result = load("copy_memory")
    deq, twin = result["rows"]["DEQ"], result["rows"]["twin"]
    columns = (deq, twin)
    rows = [
        ["parameters", *(f"{m['parameters']:,}" for m in columns), "14K", "16K", "14K", "14K"],
        ["test loss (nats)", *(f"{m['test_loss']:.1e}" for m in columns), "3.5e-6", "2.7e-5", "0.0501", "0.0491"],
        ["training time, one thread (min)", *(f"{m['minutes']:.1f}" for m in columns), "–", "–", "–", "–"],
        ["sequences seen in training", *(f"{m['training_tokens'] // 420:,}" for m in columns), "–", "–", "–", "–"],
        ["evaluations of f per solve, test", f"{deq['test_evaluations']:.1f}", f"{result['twin_depth']} layers",
         "–", "–", "–", "–"],
        ["relative residual, test", f"{deq['test_residual']:.1e}", "–", "–", "–", "–", "–"],
    ]  # fmt: skip
    names = [f"twin, {result['twin_depth']} layers", "paper: DEQ", "paper: TCN", "paper: LSTM", "paper: GRU"]
    return f"""## Copy memory

Ten symbols out of eight to be repeated after a delay of 400, 20,000 training and 2,000 test sequences; the loss is the mean
over all 420 positions (Bai et al. 2019, section 4.1 and table 1). A guess without memory scores 0.0495. Target: 1e-5.

```sh
python benchmarks/copy_memory.py
```

{table(["T = 400", "DEQ-Transformer", *names], rows)}

`{deq["command"]}` and `{twin["command"]}`, seed {deq["seed"]}. {result.get("note", "")}

Measured on {where(result)}.
"""


def memory() -> str:
    result = load("memory")
    budgets = list(next(iter(result["rows"].values()))["peak_mib"])
    rows = [
        [name, *(f"{row['peak_mib'][b]:.1f}" for b in budgets), f"{100 * row['spread']:.2f} %"]
        for name, row in result["rows"].items()
    ]
    b = result["block"]
    return f"""## Training memory is flat in the budget

Peak MiB held by tensors in one training step (solve and backward pass) of the DEQ-Transformer block, batch {b["batch"]},
length {b["length"]}, d_model {b["d_model"]}, every evaluation of the budget spent. The last row, unrolled, is for contrast.

```sh
python benchmarks/memory.py
```

{table(["evaluations of f", *budgets, "spread"], rows)}
"""


def overhead() -> str:
    result = load("overhead")
    rows = []
    for row in result["rows"]:
        solvers = row["solvers"]
        size = f"d {row['d_model']}, length {row['length']}, memory {row['memory']}, batch {row['batch']}"
        ms = min(s["ms_per_f"] for s in solvers.values())
        rows.append([size, f"{ms:.1f}", *(f"{s['overhead']:.3f}" for s in solvers.values())])
    names = list(result["rows"][0]["solvers"])
    missed = [
        f"{name} at d {row['d_model']} ({solver['overhead']:.2f})"
        for row in result["rows"]
        for name, solver in row["solvers"].items()
        if solver["overhead"] > 1.15
    ]
    verdict = f"Above the target: {', '.join(missed)}." if missed else "All meet the target."
    return f"""## Solver overhead

Wall time of a solve over (evaluations x time of one f), language-model block, forward, medians of {result["rounds"]}
interleaved rounds of {result["evaluations"]} evaluations. Target: at most 1.15.

```sh
python benchmarks/overhead.py
```

{table(["block", "one f (ms)", *names], rows)}

{verdict}

What a solver adds to f is passes over the state and its history, so it weighs most where f is smallest: f grows with the
square of d_model, the passes with d_model. What was tried: products as v Hᵀ instead of H v (which a CPU does several times
faster), differences written straight into the history and scaled in the small system instead of in memory, no data moved
for the best iterate where all samples improve, and freed memory kept by the C library (`--return-memory` shows what that
is worth).

Measured on {where(result)}.
"""


def gradients() -> str:
    result = load("gradients")
    return f"""## Gradients

Float64, the DEQ-Transformer block, {result["tensors"]} tensors: implicit gradients against 400 recorded steps of Picard,
worst relative difference **{result["against_unrolled"]:.1e}**; against central differences along random directions,
relative to the norm of the gradient, **{result["against_differences"]:.1e}**. Target: 1e-6.

```sh
python benchmarks/gradients.py
```
"""


def quickstart() -> str:
    result = load("quickstart")
    model, twin = result["model"], result["twin"]
    rows = [
        [
            "test bits per byte",
            *(f"{m['test']['bits_per_byte']:.3f}" for m in (model, twin)),
            f"{result['xz_bits_per_byte']:.3f}",
        ],
        ["parameters", *(f"{m['parameters']:,}" for m in (model, twin)), "–"],
        ["training tokens", *(f"{m['tokens']:,}" for m in (model, twin)), "–"],
        ["training time (s)", *(f"{m['train_seconds']:.0f}" for m in (model, twin)), "–"],
        ["peak memory of the process (MiB)", *(f"{m['peak_memory_bytes'] / 2**20:,.0f}" for m in (model, twin)), "–"],
    ]
    return f"""## The quickstart

Byte pairs of the documentation that CPython carries. From an empty folder to the final screen, installation included, the
command of the README took **{result["whole_command_seconds"] / 60:.1f} minutes** here (target: 5).

```sh
python benchmarks/quickstart.py
```

{table(["", "DEQ-Transformer", f"explicit twin, {twin['depth']} layers", "xz -9"], rows)}

The twin stands beside the DEQ at equal parameters and training tokens. xz sees the test text alone; the models have learned
from {model["tokens"]:,} tokens of training text.

Measured on {where(result)}.
"""


def adjoints() -> str:
    result = load("adjoints")
    b = result["block"]
    rows = [
        [
            f"`{name}`",
            f"{row['error']:.1e}",
            f"{row['time']:.2f}",
            f"{row['held_mib']:.1f}",
            "–" if row["backward_products"] is None else str(row["backward_products"]),
        ]
        for name, row in result["rows"].items()
    ]
    return f"""## Ways to differentiate

The block of the DEQ-Transformer (batch {b["batch"]}, length {b["length"]}, d_model {b["d_model"]}, weights N(0, 0.03²),
float32) solved by `Anderson()` to a relative residual of 1e-4; `Reversible()` by `ReversiblePicard()`, 40 evaluations at
most. The error is that of the gradient in the injection, against a float64 solve to 1e-12; it holds the error of z too, so
that no row can be much better than `Implicit()`. Time is that of solve and backward pass relative to `Implicit()`, median
of {result["rounds"]} interleaved rounds; memory is what is held between the two.

```sh
python benchmarks/adjoints.py
```

{table(["adjoint", "error of the gradient", "time", "held (MiB)", "products"], rows)}

Measured on {where(result)}.
"""


def hard_maps() -> str:
    result = load("hard_maps")
    rows = []
    for name, solvers in result["rows"].items():
        cells = []
        for by_tolerance in solvers.values():
            for counts in by_tolerance.values():
                cells.append("/".join("–" if counts[key] is None else str(counts[key]) for key in ("half", "all")))
        rows.append([name, *cells])
    head = ["map", *(f"{solver} to {rtol}" for solver in next(iter(result["rows"].values())) for rtol in ("1e-3", "1e-6"))]
    return f"""## Evaluations on hard maps

Evaluations of f until half and until all of the samples have a relative residual of 1e-3 or 1e-6 (half/all), float32,
budget {result["budget"]}; – where that was not reached. 32 samples of the tanh maps, 16 of the Transformer blocks (d_model
128, length 64).

```sh
python benchmarks/hard_maps.py
```

{table(head, rows)}
"""


def main() -> None:
    parts = (quickstart, copy_memory, language_models, memory, overhead, hard_maps, adjoints, gradients)
    text = (
        "# Results\n\nEvery figure here was measured by the command beside it and set by `python benchmarks/report.py`.\n\n"
    )
    text += "\n".join(part() for part in parts)
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(text)
    print(f"wrote {PAGE.name}")


if __name__ == "__main__":
    main()
