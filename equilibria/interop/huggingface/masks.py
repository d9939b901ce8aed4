"""What an attention mask of Transformers says of texts of several lengths."""

from __future__ import annotations

from torch import Tensor


def leading_padding(mask: Tensor | None, tokens: Tensor, seen: int) -> Tensor | None:
    """(B,) how many of the first of tokens (B, L) are padding, `seen` tokens after the start; None where none is.

    Padding behind a text needs nothing: the map is causal.

    Args:
        mask: (B, seen + L), 0 for padding, else 1; None for no padding.

    Raises:
        ValueError: another shape, or padding between tokens of a text: positions are relative, and would be others.
    """
    if mask is None:
        return None
    batch, length = tokens.shape
    if mask.shape != (batch, seen + length):
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}, but {batch} texts with {length} tokens after {seen} in the "
            f"cache need ({batch}, {seen + length})"
        )
    text = mask != 0
    if bool(text.all()):
        return None
    starts = (text[:, 1:] & ~text[:, :-1]).sum(1) + text[:, 0]
    if bool((starts > 1).any()):
        row = int((starts > 1).nonzero()[0])
        raise ValueError(
            f"attention_mask has padding inside the text of row {row}; pad before a text or behind it, and before it where "
            "it is to be continued"
        )
    leading = (text.cumsum(1) == 0).sum(1)
    padding = (leading - seen).clamp(0, length)
    return padding if bool(padding.any()) else None
