"""Text from a language model at equilibrium, one solve of one position per token.

The map is causal: f at position i reads positions up to i alone. So the equilibrium of earlier positions does not
change when a token is added. `generate` keeps what the model's `extend` needs of them (for a Transformer keys and values
of the last `window - 1`, for a TrellisNet the last columns) and solves for a state of length 1; the result is that of
solving the whole text again, to the tolerance of the solves.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from equilibria.models.language_model import EquilibriumLM
from equilibria.nn.computed_once import computed_once


def generate(
    model: EquilibriumLM,
    prompt: Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    cache: bool = True,
    window: int | None = None,
) -> Tensor:
    """(B, T + max_new_tokens): the prompt (B, T) and what the model makes follow it.

    Args:
        model: in evaluation mode.
        prompt: (B, T) int64, T at least 1.
        max_new_tokens: how many tokens to add, 0 or more.
        temperature: divides the logits; 0 takes the most probable token.
        top_k: draw from the k most probable tokens alone.
        top_p: draw from the smallest set of most probable tokens that together have at least this probability
            (Holtzman et al., "The Curious Case of Neural Text Degeneration", 2020). Applied after top_k.
        generator: source of random numbers, on the device of the model.
        cache: solve for the new position alone; False solves the whole text again for every token.
        window: how many positions one position sees, itself included; None for the model's own `window`.

    Raises:
        ValueError: a value out of range, or a model in training mode.

    >>> from equilibria.models.deq_transformer import DEQTransformerLM, TransformerConfig
    >>> model = DEQTransformerLM(TransformerConfig(vocab_size=100, d_model=32)).eval()
    >>> generate(model, torch.tensor([[1, 2, 3]]), max_new_tokens=10, temperature=0.8, top_k=40).shape
    torch.Size([1, 13])
    """
    tokens = stream(
        model,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        generator=generator,
        cache=cache,
        window=window,
    )
    return torch.cat((prompt, *(token[:, None] for token in tokens)), dim=1)


def stream(
    model: EquilibriumLM,
    prompt: Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    cache: bool = True,
    window: int | None = None,
) -> Iterator[Tensor]:
    """As `generate`, but yields each new token (B,) as soon as it is known. Wrong arguments raise at once, not later.

    >>> from equilibria.models.deq_transformer import DEQTransformerLM, TransformerConfig
    >>> model = DEQTransformerLM(TransformerConfig(vocab_size=100, d_model=32)).eval()
    >>> len([int(token) for token in stream(model, torch.tensor([[1, 2, 3]]), max_new_tokens=5)])
    5
    """
    _check_sampling(temperature, top_k, top_p)
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; give 0 or more")
    window = _check_input(model, prompt, window)

    def tokens() -> Iterator[Tensor]:
        text = unseen = prompt
        seen: Any = None
        for _ in range(max_new_tokens):
            if cache:
                last, seen = _extend(model, unseen, seen, window)
            else:
                last, _ = _extend(model, text, None, window)
            token = sample(last[:, -1], temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
            unseen = token[:, None]
            text = torch.cat((text, unseen), dim=1)
            yield token

    return tokens()


@torch.no_grad()
def next_token_log_prob(model: EquilibriumLM, tokens: Tensor, *, cache: bool = False, window: int | None = None) -> Tensor:
    """(B, T, V): the log-probabilities of the token after each of tokens (B, T).

    Args:
        cache: False solves all positions together; True adds one position after the other, as `generate` does. Both
            give the same numbers, to the tolerance of the solves.
        window: as for `generate`.

    >>> from equilibria.models.deq_transformer import DEQTransformerLM, TransformerConfig
    >>> model = DEQTransformerLM(TransformerConfig(vocab_size=100, d_model=32)).eval()
    >>> next_token_log_prob(model, torch.tensor([[1, 2, 3]])).shape
    torch.Size([1, 3, 100])
    """
    window = _check_input(model, tokens, window)
    if not cache:
        return model.log_prob(model.extend(tokens, None, window).z)
    rows: list[Tensor] = []
    seen: Any = None
    for token in tokens.split(1, dim=1):
        row, seen = _extend(model, token, seen, window)
        rows.append(row)
    return torch.cat(rows, dim=1)


def sample(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """(B,) int64: one draw from each row of logits (B, V); the arguments are those of `generate`.

    >>> sample(torch.tensor([[0.0, 3.0, 1.0]]), temperature=0)
    tensor([1])
    """
    _check_sampling(temperature, top_k, top_p)
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        lowest = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < lowest, -torch.inf)
    if top_p is not None:
        ranked, order = logits.sort(dim=-1, descending=True)
        probabilities = ranked.softmax(dim=-1)
        # A token stays if those before it have not reached top_p yet, so that the first one always stays.
        before = probabilities.cumsum(dim=-1) - probabilities
        ranked = ranked.masked_fill(before >= top_p, -torch.inf)
        logits = torch.empty_like(logits).scatter_(-1, order, ranked)
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)[:, 0]


@torch.no_grad()
def _extend(model: EquilibriumLM, tokens: Tensor, cache: Any, window: int | None) -> tuple[Tensor, Any]:
    """Log-probabilities (B, 1, V) of the token after n further tokens (B, n), and the cache with them added.

    At most `window` tokens at a time, which bounds the memory that a long prompt takes.
    """
    first, *rest = tokens.split(window or tokens.shape[1], dim=1)
    with computed_once(model):  # or each layer of a stack would normalise all weights anew
        z, cache, _ = model.extend(first, cache, window)
        for piece in rest:
            z, cache, _ = model.extend(piece, cache, window)
        return model.log_prob(z[:, -1:]), cache


def _check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}; give 0 for the most probable token, or a finite number above 0")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}; give 1 or more, or None to draw from all tokens")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; give a probability above 0 and at most 1, or None to draw from all tokens")


def _check_input(model: EquilibriumLM, tokens: Tensor, window: int | None) -> int | None:
    """The window that counts."""
    if model.training:
        raise ValueError("the model is in training mode, with dropout and training tolerances; call model.eval() first")
    if tokens.dim() != 2 or tokens.numel() == 0:
        raise ValueError(f"tokens have shape {tuple(tokens.shape)}; give (batch, length) with at least one token")
    low, high, size = int(tokens.min()), int(tokens.max()), model.config.vocab_size
    if low < 0 or high >= size:
        raise ValueError(f"tokens range from {low} to {high}; this model knows 0 to {size - 1}")
    if window is not None:
        if window < 1:
            raise ValueError(f"window is {window}; a position must at least see itself: give 1 or more")
        return window
    return model.window
