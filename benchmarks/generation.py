"""Generation at equilibrium: tokens per second with the cache of solved positions and with a full solve for every token.

First the two are compared where it counts: the logits of a text, to a tight tolerance in float64, and the tokens that
greedy decoding picks with the run's own tolerances. Then both generate, in turn.

    python benchmarks/generation.py RUN
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
from pathlib import Path

import torch
from harness import interleaved, save

from equilibria import Stopping
from equilibria.cli.load import load_run
from equilibria.models import generate, next_token_log_prob
from equilibria.recipes.build import build_corpus

PROMPT, NEW, ROUNDS = 128, 48, 3


def main(folder: Path) -> None:
    torch.set_num_threads(2)
    run = load_run(folder)
    model = run.model().eval()
    prompt = build_corpus(run.config.data).test.tokens[None, :PROMPT]

    exact = run.model().double().eval()
    exact.deq.eval_stopping = Stopping(rtol=1e-10, atol=0.0, max_evals=400)
    text = prompt[:, :96]
    one_by_one, together = (next_token_log_prob(exact, text, cache=cache) for cache in (True, False))
    difference = float((one_by_one - together).abs().max() / together.abs().max())
    if difference > 1e-7:
        raise SystemExit(f"the logits of both ways differ by {difference:.1e}")

    def run_once(cache: bool) -> torch.Tensor:
        return generate(model, prompt, max_new_tokens=NEW, temperature=0.0, cache=cache)

    same = int((run_once(True) == run_once(False)).sum()) - PROMPT
    seconds = interleaved({"cached": lambda: run_once(True), "full": lambda: run_once(False)}, ROUNDS)
    speed = {name: NEW / statistics.median(values) for name, values in seconds.items()}
    print(
        f"cached {speed['cached']:.1f} tokens/s, full re-solve {speed['full']:.1f} tokens/s; "
        f"logits differ by {difference:.1e} (float64), {same} of {NEW} greedy tokens agree at the run's tolerance"
    )
    save(
        "generation",
        {
            "recipe": run.config.recipe,
            "model": dataclasses.asdict(run.config.model),
            "prompt": PROMPT,
            "new_tokens": NEW,
            "tokens_per_second": speed,
            "logit_difference": difference,
            "greedy_agreement": same / NEW,
        },
    )


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]))
