"""Generation at equilibrium: tokens per second with the cache of solved positions, with a full solve for every token, and
of the explicit twin with the cache of all its layers.

First each is compared with itself where it counts: the logits of a text, position by position with the cache and all
together, to a tight tolerance in float64. Then all generate in turn. A token's time is the median over the tokens after the
first, so the prompt is not in it; the text is longer than the window all
the time. Prompts are random tokens.

    python benchmarks/generation.py [RUN]    # two sizes as they are initialised, and the Transformer of a run

The twin has the weights of the equilibrium, and as many layers as in the comparison of language models.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from harness import save
from torch import Tensor

from equilibria import Anderson, Broyden, Picard, Stopping
from equilibria.cli.load import load_run
from equilibria.models import next_token_log_prob, stream
from equilibria.models.deq_transformer import DEQTransformerLM, TransformerConfig
from equilibria.solvers import Solver

SIZES = (
    TransformerConfig(vocab_size=10_000, d_model=128, n_head=4, d_inner=512, mem_len=64),
    TransformerConfig(vocab_size=10_000, d_model=512, n_head=8, d_inner=2048, mem_len=150),
)
TWIN_DEPTH = 8
BATCHES = (1, 8)
SOLVERS: dict[str, Solver[Any]] = {"anderson": Anderson(), "broyden": Broyden(), "picard": Picard()}
STOPPING = Stopping(rtol=1e-2, max_evals=100)
NEW, NEW_FULL, ROUNDS, CHECKED = 16, 2, 3, 24


def main(folder: Path | None) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    models: dict[str, Any] = {f"d_model {config.d_model}, untrained": DEQTransformerLM(config) for config in SIZES}
    if folder is not None:
        run = load_run(folder)
        models[f"{run.config.recipe}, {run.config.optim.steps} steps"] = run.model()
    rows = []
    for name, model in models.items():
        if not isinstance(model, DEQTransformerLM):
            raise SystemExit(f"{folder} is no Transformer")
        for row in measure(model.eval()):
            print(f"{name}: {row}", flush=True)
            rows.append({"model": name, "d_model": model.config.d_model, "window": model.window, **row})
    tolerance = {"rtol": STOPPING.rtol, "max_evals": STOPPING.max_evals}
    save("generation", {"twin_depth": TWIN_DEPTH, "new_tokens": NEW, "tolerance": tolerance, "rows": rows})


def measure(model: DEQTransformerLM) -> list[dict[str, Any]]:
    model.deq.eval_stopping = STOPPING
    twin = twin_of(model)
    length = (model.window or 64) + 8
    text = torch.randint(model.config.vocab_size, (max(BATCHES), length))
    differences = {"equilibrium": check(model, text), "twin": check(twin, text)}
    rows = []
    for batch in BATCHES:
        ways = {"twin": Way(twin, text[:batch]), "full": Way(model, text[:batch], cache=False)}
        ways |= {name: Way(model, text[:batch], solver=solver) for name, solver in SOLVERS.items()}
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for round_number in range(ROUNDS + 1):
            for name, way in ways.items():
                found = way.seconds()
                seconds[name] += found if round_number else []  # the first is for warming up
        rows.append(
            {
                "batch": batch,
                "tokens_per_second": {name: batch / statistics.median(values) for name, values in seconds.items()},
                "positions": {name: ways[name].positions() for name in SOLVERS},
                "logit_difference": differences,
            }
        )
    return rows


def twin_of(model: DEQTransformerLM) -> DEQTransformerLM:
    twin = DEQTransformerLM(dataclasses.replace(model.config, depth=TWIN_DEPTH))
    twin.load_state_dict(model.state_dict())
    return twin.eval()


def check(model: DEQTransformerLM, text: Tensor) -> float:
    """Largest difference of logits, relative to the largest of them, in float64; with a window that the text outgrows."""
    exact = DEQTransformerLM(model.config, eval_stopping=Stopping(rtol=1e-10, atol=0.0, max_evals=400)).double().eval()
    exact.load_state_dict(model.state_dict())
    ways = [next_token_log_prob(exact, text[:2, :CHECKED], cache=cache, window=CHECKED // 2) for cache in (True, False)]
    difference = float((ways[0] - ways[1]).abs().max() / ways[1].abs().max())
    if not difference < 1e-7:
        raise SystemExit(f"the logits of both ways differ by {difference:.1e}")
    return difference


class Way:
    """One way to generate."""

    def __init__(self, model: DEQTransformerLM, prompt: Tensor, *, cache: bool = True, solver: Solver[Any] | None = None):
        self.model, self.prompt, self.cache = model, prompt, cache
        self.solver = Anderson() if solver is None else solver

    def seconds(self) -> list[float]:
        """Of each token after the first."""
        self.model.deq.solver = self.solver
        count = NEW if self.cache else NEW_FULL
        tokens = stream(self.model, self.prompt, max_new_tokens=count + 1, temperature=0.0, cache=self.cache)
        next(tokens)
        found = []
        for _ in range(count):
            start = time.perf_counter()
            next(tokens)
            found.append(time.perf_counter() - start)
        return found

    @torch.no_grad()
    def positions(self) -> dict[str, float]:
        """Evaluations of one position, and the share of positions that were solved, over the last few of the prompt."""
        self.model.deq.solver = self.solver
        cache, evaluations, solved = self.model.extend(self.prompt[:, :-8], None, self.model.window).cache, [], []
        for token in self.prompt[:, -8:].split(1, dim=1):
            _, cache, stats = self.model.extend(token, cache, self.model.window)
            assert stats is not None
            evaluations.append(stats.evaluations)
            solved.append(float(stats.converged.double().mean()))
        return {"evaluations": statistics.mean(evaluations), "solved": statistics.mean(solved)}


if __name__ == "__main__":
    if len(sys.argv) > 2:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]) if len(sys.argv) == 2 else None)
