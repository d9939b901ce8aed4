"""Checks of options; a wrong one is a UserError that names the option as it is typed."""

from __future__ import annotations

import math

from equilibria.solution import UserError


def check(condition: bool, option: str, value: object, remedy: str) -> None:
    """Raise a UserError about the option unless the condition holds."""
    if not condition:
        raise UserError(f"--{option.replace('_', '-')} is {value}; {remedy}")


def check_positive(config: object, *names: str) -> None:
    """Each named field that is not None must be above zero, and finite."""
    for name in names:
        value = getattr(config, name)
        check(value is None or value > 0, name, value, "give a number above zero")
        check(value is None or value < math.inf, name, value, "give a finite number")


def check_not_negative(config: object, *names: str) -> None:
    """Each named field that is not None must be zero or more, and finite."""
    for name in names:
        value = getattr(config, name)
        check(value is None or value >= 0, name, value, "give zero or more")
        check(value is None or value < math.inf, name, value, "give a finite number")
