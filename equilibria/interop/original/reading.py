"""Looking at the tensors of a checkpoint, and keeping account of what they tell."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from equilibria.interop.original.names import Family, original_name
from equilibria.interop.original.options import flag, show
from equilibria.solution import UserError


class Reader:
    """Looks at tensors and options, and keeps account of what was found and what assumed."""

    def __init__(self, named: Mapping[str, Tensor], given: dict[str, object], family: Family) -> None:
        self.named, self.given = named, given
        self.family: Family = family
        self.found: dict[str, object] = {}
        self.assumed: dict[str, object] = {}

    def size(self, name: str, *, dims: int) -> tuple[int, ...]:
        """Shape of a tensor that must be there. For a weight under weight norm, that of its direction."""
        tensor = self.named.get(name, self.named.get(name.replace("weight", "parametrizations.weight.original1")))
        if tensor is None:
            raise UserError(f"{original_name(name, self.family)} is missing")
        if tensor.dim() != dims:
            shape, theirs = tuple(tensor.shape), original_name(name, self.family)
            raise UserError(f"{theirs} has shape {shape}, but in the original's models {dims} dimensions")
        return tuple(tensor.shape)

    def count(self, prefix: str) -> int:
        """How many tensors stand in a list."""
        return sum(name.startswith(prefix) for name in self.named)

    def tell(self, option: str, value: object) -> None:
        """Note what tensors tell of an option; what was given must agree."""
        given = self.given.get(option, value)
        if given != value:
            raise UserError(f"{flag(option)} is {show(given)}, but the tensors say {show(value)}; leave the option out")
        self.found[option] = value

    def ask(self, option: str, default: int | float) -> int | float:
        """The value of an option that no tensor tells."""
        value = self.given.get(option)
        if value is None:
            self.assumed[option] = value = default
        assert isinstance(value, int | float)
        return value

    def ask_count(self, option: str, default: int, *, lowest: int = 1) -> int:
        """The same for a whole number that is not below `lowest`."""
        value = int(self.ask(option, default))
        if value < lowest:
            raise UserError(f"{flag(option)} is {value}; give {lowest} or more")
        return value

    def ask_share(self, option: str) -> float:
        """The same for a rate of dropout."""
        value = float(self.ask(option, 0.0))
        if not 0 <= value < 1:
            raise UserError(f"{flag(option)} is {value}; give a share from 0 up to, not including, 1")
        return value

    def equal(self, one: str, other: str) -> bool:
        """Whether two tensors are one, or as good as one."""
        first, second = self.named.get(one), self.named.get(other)
        return first is not None and second is not None and first.shape == second.shape and torch.equal(first, second)
