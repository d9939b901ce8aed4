"""How well a model predicts a split, and what that costs."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from equilibria.data import Split
from equilibria.solution import NonFiniteError
from equilibria.train.distributed import ALONE, Ranks
from equilibria.train.reading import rows_of
from equilibria.train.solves import SolveMeter


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Result of reading a split once from its beginning to its end."""

    nll: float
    """Negative log-likelihood, nats per token."""
    perplexity: float
    """exp(nll), per token."""
    bits_per_byte: float | None
    """nll of the whole split in bits, over the UTF-8 bytes of its text; None where the tokens stand for no text."""
    tokens: int
    """Tokens predicted."""
    seconds: float
    """Wall time."""
    evaluations: float | None = None
    """Evaluations of f per solve; None for an explicit stack."""
    residual: float | None = None
    """Mean relative residual ‖f(z) - z‖ / ‖f(z)‖ of the states returned."""
    unconverged: float | None = None
    """Share of sequences whose solve ended above the tolerance."""

    @property
    def tokens_per_second(self) -> float:
        """Speed of the evaluation."""
        return self.tokens / self.seconds


@torch.no_grad()
def evaluate(
    model: nn.Module,
    split: Split,
    *,
    batch_size: int,
    length: int,
    device: torch.device | str = "cpu",
    depth: int | None = None,
    max_steps: int | None = None,
    on_segment: Callable[[], None] = lambda: None,
    ranks: Ranks = ALONE,
) -> Evaluation:
    """Read a split in `batch_size` lanes of `length` tokens a segment, with the memory carried all the way.

    Independent sequences are read `batch_size` at a time, each from an empty memory. Every batch counts as much as it has
    targets. Of a text, the few tokens that do not fill the lanes, and each lane's first, are not predicted; bits per byte
    count them at the mean of the others. `depth` evaluates the explicit stack of that many blocks; `max_steps` reads the
    first so many segments alone. `on_segment` is called after each segment and may raise to stop. Processes share the lanes
    and get the same result: that of one process, but for rounding and for `evaluations`, a mean over solves of fewer lanes.
    """
    batches = split.batches(max(1, min(batch_size, split.max_batch_size)), length, device)
    meter, fault = SolveMeter(), None
    total, count, memory = 0.0, 0, None
    training = model.training
    model.eval()
    started = time.perf_counter()
    try:
        for index in range(len(batches) if max_steps is None else min(max_steps, len(batches))):
            rows = rows_of(batches[index], ranks)
            count += rows.size
            try:
                output = model(rows.tokens, rows.targets, memory, depth=depth) if fault is None else None
            except NonFiniteError as error:
                if ranks.count == 1:
                    raise
                fault, output = error, None  # the others, who know nothing of it, are met once more at the end
            if output is not None:
                memory = output.memory if batches.carries_memory else None
                if rows.share > 0:
                    total += output.nll.sum().item()
                    for stats in output.stats:
                        meter(stats)
            on_segment()
    finally:
        model.train(training)
    sums = torch.tensor([math.nan if fault else total, *meter.sums], dtype=torch.float64)
    total, *meter.sums = ranks.sum(sums).tolist()
    if fault is not None:
        raise fault
    nll = total / count
    means = meter.means()
    return Evaluation(
        nll=nll,
        perplexity=math.exp(min(nll, 700.0)),  # an untrained or diverged model must not overflow
        bits_per_byte=split.text_bytes and nll / math.log(2) * split.tokens.numel() / split.text_bytes,
        tokens=count,
        seconds=time.perf_counter() - started,
        **(dataclasses.asdict(means) if means else {}),
    )
