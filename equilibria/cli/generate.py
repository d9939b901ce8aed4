"""`equilibria generate`: continue a text with the model of a run."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from equilibria.cli.load import device, load_run
from equilibria.cli.parse import parse
from equilibria.data import Tokenizer
from equilibria.models import EquilibriumLM
from equilibria.models.generation import stream
from equilibria.solution import UserError


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """Options of `equilibria generate`."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of the run (its twin is in RUN/twin)."""
    prompt: str
    """Text to continue."""
    data_dir: Path | None = None
    """Folder with the text of a run that was converted without it."""
    tokens: int = 100
    """Tokens to generate."""
    temperature: float = 0.8
    """Below 1 prefers likely tokens; 0 always takes the likeliest."""
    top_k: int | None = None
    """Draw from this many likeliest tokens."""
    top_p: float | None = None
    """Draw from the fewest tokens that together have this probability."""
    seed: int = 0
    """Seed of the draws."""
    cache: bool = True
    """Keep what a new position needs of those before it; --no-cache solves the whole text again for every token."""
    compare: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Generate once more the other way, and print the speed of both."""

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise UserError(f"--tokens is {self.tokens}; give at least 1")
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"--temperature is {self.temperature}; give a finite number, 0 or more")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"--top-k is {self.top_k}; give at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"--top-p is {self.top_p}; give a probability above 0 and at most 1")


def generate_command(argv: Sequence[str]) -> int:
    """Run `equilibria generate`: the text goes to standard output as it comes, the speed to standard error."""
    options = parse(
        GenerateOptions,
        argv,
        command="equilibria generate",
        description="Continue a text with the best weights of a run.",
    )
    run = load_run(options.run, options.data_dir)
    model = run.model()
    prompt = encode_prompt(run.tokenizer, options.prompt)

    def ids(cache: bool) -> Iterator[int]:
        generator = torch.Generator(device()).manual_seed(options.seed)
        return generate_ids(
            model, prompt, options.tokens, options.temperature, options.top_k, options.top_p, generator, cache=cache
        )

    print(options.prompt, end="", flush=True)
    produced: list[int] = []
    started = time.perf_counter()
    for piece in text_pieces(run.tokenizer, prompt, _collect(ids(options.cache), produced)):
        print(piece, end="", flush=True)
    seconds = time.perf_counter() - started
    print(flush=True)
    _print_speed(options.cache, len(produced), seconds)
    if options.compare:
        started = time.perf_counter()
        again = list(ids(not options.cache))
        other_seconds = time.perf_counter() - started
        _print_speed(not options.cache, len(again), other_seconds)
        equal = sum(a == b for a, b in zip(produced, again, strict=True))
        _note(f"{equal} of {len(again)} tokens are the same both ways")
    return 0


def generate_ids(
    model: EquilibriumLM,
    prompt: Sequence[int],
    tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator,
    *,
    cache: bool = True,
) -> Iterator[int]:
    """New token ids, one by one."""
    start = torch.tensor([list(prompt)], device=device())  # (1, T)
    for token in stream(
        model,
        start,
        max_new_tokens=tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        generator=generator,
        cache=cache,
    ):
        yield int(token)


def text_pieces(tokenizer: Tokenizer, prompt: Sequence[int], ids: Iterator[int]) -> Iterator[str]:
    """Text as it becomes known: a character whose bytes are not complete yet is held back."""
    known = list(prompt)
    shown = tokenizer.decode(known)
    for token in ids:
        known.append(token)
        text = tokenizer.decode(known)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            yield text[len(shown) :]
            shown = text
    yield tokenizer.decode(known)[len(shown) :]


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Tokens of a prompt; there must be at least one."""
    ids = tokenizer.encode(prompt)
    if not ids:
        raise UserError("--prompt is empty; give at least one word to continue")
    return ids


def _collect(ids: Iterator[int], into: list[int]) -> Iterator[int]:
    for token in ids:
        into.append(token)
        yield token


def _print_speed(cache: bool, tokens: int, seconds: float) -> None:
    way = "with solved positions kept" if cache else "solving the whole text again"
    _note(f"{tokens} tokens in {seconds:.2f} s: {tokens / seconds:.1f} tokens/s {way}")


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
