"""Text made up by the tests."""

from __future__ import annotations

import random


def generated_text(seed: int, size: int) -> str:
    """About `size` characters of paragraphs, one sentence a line and an empty line after each paragraph."""
    draw = random.Random(seed)
    verbs = {"cat": "sleeps", "dog": "barks", "bird": "sings", "child": "laughs", "river": "flows", "Zoë": "reads"}
    qualities = ["old", "small", "quiet", "happy", "grey"]
    text = ""
    while len(text) < size:
        place = draw.choice(["the garden", "the kitchen", "the village", "the harbour"])
        text += f"In {place}.\n"
        for _ in range(draw.randint(2, 6)):
            subject = draw.choice(list(verbs))
            text += f"The {draw.choice(qualities)} {subject} {verbs[subject]} in {place}.\n"
        text += "\n"
    return text
