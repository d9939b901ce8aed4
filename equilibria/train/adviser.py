"""Who gives advice, and how often."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from equilibria.train.advice import RULES, Advice, bf16_floor
from equilibria.train.config import RunConfig
from equilibria.train.history import History

MUCH_WORSE = 3.0
"""Factor of the severity at which a kind of advice is given again."""


class Adviser:
    """Gives each kind of advice once, and again only where things have become much worse."""

    def __init__(self, config: RunConfig) -> None:
        self.history = History(config)
        self._said: dict[str, float] = {}

    def start(self) -> list[Advice]:
        """What the configuration alone tells."""
        return self._new(bf16_floor(self.history))

    def see(self, row: Mapping[str, Any]) -> list[Advice]:
        """What is new with this row."""
        self.history.add(row)
        return self._new(*(rule(self.history) for rule in RULES))

    def _new(self, *found: Advice | None) -> list[Advice]:
        new = []
        for advice in found:
            if advice and advice.severity >= MUCH_WORSE * self._said.get(advice.kind, 0.0):
                self._said[advice.kind] = advice.severity
                new.append(advice)
        return new


def advise(rows: Iterable[Mapping[str, Any]], config: RunConfig) -> list[Advice]:
    """All that a run with these rows was told."""
    adviser = Adviser(config)
    return [*adviser.start(), *(advice for row in rows for advice in adviser.see(row))]
