"""Times, perplexities and paths as people read them."""

from __future__ import annotations

from pathlib import Path


def shown_time(seconds: float) -> str:
    """Such as 3 min 5 s."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def shown_perplexity(value: float) -> str:
    """Such as 1,234.56; that of a model that is lost, such as 5.7e+64."""
    return f"{value:,.2f}" if value < 1e7 else f"{value:.1e}"


def shown_path(path: Path) -> str:
    """A path as one would type it: relative if it is below the current folder."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)
