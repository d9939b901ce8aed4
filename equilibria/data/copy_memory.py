"""The copy-memory task: remember ten symbols over a long stretch of nothing."""

from __future__ import annotations

import torch

from equilibria.data.batching import generator
from equilibria.data.corpus import Corpus, SequenceSplit
from equilibria.data.vocabulary import Vocabulary
from equilibria.solution import UserError

DELAY = 400
REMEMBERED = 10  # symbols in each sequence
SYMBOLS = 8  # that they are drawn from
BLANK, DELIMITER = 0, SYMBOLS + 1


def copy_memory(delay: int = DELAY, *, train: int = 20_000, valid: int = 2_000, test: int = 2_000, seed: int = 0) -> Corpus:
    """Sequences of T + 20 tokens, T the `delay`, whose last ten targets are their first ten tokens.

        position   0 .. 9        10 .. T + 8   T + 9 .. T + 19
        input      s_0 .. s_9    0 .. 0        9 .. 9              s_i drawn from 1 .. 8, independently and uniformly
        target     0 .. 0                      0, s_0 .. s_9

    So there are T - 1 blanks (0), then a delimiter (9), and ten more of it while the symbols are asked for. The loss is
    the mean over all T + 20 positions; a model without memory knows the blanks and guesses among eight symbols at ten
    positions, which gives 10 ln 8 / (T + 20) nats: 0.0495 for T = 400.

    There are 20,000 sequences to train on and 2,000 to test on. The papers have no others; the 2,000 of `valid` are
    ours, so that nothing is chosen on the test split. All are drawn from `seed`, each split on its own, and are nowhere
    stored. The tokens stand for no text: `test_text` and `text_bytes` are None, and there are no bits per byte.

    Sources: Hochreiter and Schmidhuber, Long Short-Term Memory (1997); in this form, Bai, Kolter and Koltun, An
    Empirical Evaluation of Generic Convolutional and Recurrent Networks (2018), section 4; Deep Equilibrium Models
    (NeurIPS 2019), section 4.1. Raises UserError for a delay or a number of sequences below 1.

    >>> split = copy_memory(delay=5, train=1, valid=1, test=1).train
    >>> split.tokens.shape, split.targets[0, -10:].equal(split.tokens[0, :10])
    (torch.Size([1, 25]), True)
    """
    for name, value in {"delay": delay, "train": train, "valid": valid, "test": test}.items():
        if value < 1:
            raise UserError(f"the copy-memory task has no {name} of {value}; give at least 1")
    splits = (_split(delay, count, seed, name) for name, count in {"train": train, "valid": valid, "test": test}.items())
    symbols = Vocabulary(list(map(str, range(DELIMITER + 1))), end_of_line=False)
    return Corpus("copy-memory", *splits, tokenizer=symbols, test_text=None)


def _split(delay: int, count: int, seed: int, name: str) -> SequenceSplit:
    symbols = torch.randint(1, SYMBOLS + 1, (count, REMEMBERED), generator=generator(seed, name), dtype=torch.uint8)
    inputs = torch.full((count, delay + 2 * REMEMBERED), BLANK, dtype=torch.uint8)  # (N, T + 20)
    targets = torch.full_like(inputs, BLANK)
    inputs[:, :REMEMBERED] = symbols
    inputs[:, -REMEMBERED - 1 :] = DELIMITER
    targets[:, -REMEMBERED:] = symbols
    return SequenceSplit(inputs, None, targets=targets)
