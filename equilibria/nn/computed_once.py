"""Parametrised tensors of a block, computed once per solve instead of at every evaluation.

`torch.nn.utils.parametrize` computes a parametrised tensor, such as a weight under weight norm, each time it is read. While
z moves none of them changes (or may change: spectral norm advances its power iteration, a dropped weight draws a mask). So
they are arguments of the map like any other: computed before the solve, and put in their place for each evaluation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import set_checkpoint_early_stop


@contextmanager
def computed_once(module: nn.Module) -> Iterator[tuple[list[Place], tuple[Tensor, ...]]]:
    """Compute every parametrised tensor of `module` now, with its graph, and read that value until the context is left.

    `DEQ` and `stack` do so by themselves. Code that calls `prepare`, `solve` and `jacobian_loss` one after the other shares
    the values, and the masks of dropped weights, by this. Yields what was computed, and where it belongs.

    >>> from torch.nn.utils.parametrizations import weight_norm
    >>> layer = weight_norm(nn.Linear(2, 2))
    >>> with computed_once(layer):
    ...     layer.weight is layer.weight
    True
    >>> layer.weight is layer.weight
    False
    """
    places = parametrized(module)
    values = tuple(getattr(place.owner, place.name) for place in places)
    with _in_place(places, values):
        yield places, values


class WithConstants(nn.Module):
    """A block as a map of z, the values of its parametrised tensors, and args: forward(z, values, *args)."""

    def __init__(self, block: nn.Module, places: Sequence[Place]) -> None:
        super().__init__()
        self.block = block
        self.places = tuple(places)

    def forward(self, z: Any, values: Sequence[Tensor], *args: Any) -> Any:
        # A checkpoint inside the block would be recomputed when the values are no longer in place. Without an early stop
        # torch notices, since computing them saves more tensors than the evaluation did. A compiled graph keeps its values.
        strict = nullcontext() if torch.compiler.is_compiling() else set_checkpoint_early_stop(False)
        there = all(place.reads_as(value) for place, value in zip(self.places, values, strict=True))
        with nullcontext() if there else _in_place(self.places, values), strict:
            return self.block(z, *args)

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """Without the buffers of parametrisations: the map does not use them, and the next solve may write to them."""
        inside = {id(buffer) for place in self.places for buffer in place.usual().buffers()}
        for name, buffer in super().named_buffers(prefix, recurse, remove_duplicate):
            if id(buffer) not in inside:
                yield name, buffer


class Place:
    """Where a parametrised tensor is found, and what can stand in for its parametrisation."""

    def __init__(self, owner: nn.Module, name: str) -> None:
        self.owner, self.name = owner, name
        self.key = (id(owner), name)  # of torch's own cache
        self.parametrizations = parametrizations_of(owner)
        self.constant = _Constant(self.usual())

    def usual(self) -> nn.Module:
        return self.parametrizations[self.name]

    def reads_as(self, value: Tensor) -> bool:
        usual = self.usual()
        return isinstance(usual, _Constant) and usual.value is value


class _Constant(nn.Module):
    """Stands in for a parametrisation, with the same parameters and buffers to whoever looks, but reads as `value`.

    The value is neither: a solve inside passes it on as an argument.
    """

    def __init__(self, usual: nn.Module) -> None:
        super().__init__()
        self._parameters, self._buffers, self._modules = usual._parameters, usual._buffers, usual._modules
        self.value: Tensor | None = None

    def __call__(self) -> Tensor | None:
        return self.value


def parametrized(module: nn.Module) -> list[Place]:
    """All parametrised tensors of a module and its children, but not those of which the parametrisations are made."""
    places: list[Place] = []
    seen: set[nn.Module] = set()
    queue = [module]
    while queue:
        owner = queue.pop()
        if owner in seen:
            continue
        seen.add(owner)
        inside = parametrizations_of(owner)
        places += [Place(owner, name) for name in inside]
        queue += [child for name, child in owner.named_children() if not inside or name != "parametrizations"]
    return places


@contextmanager
def _in_place(places: Sequence[Place], values: Sequence[Tensor]) -> Iterator[None]:
    """Let each parametrised tensor read as the value given, also under `parametrize.cached()`."""
    usual = [place.usual() for place in places]
    cached = {place.key: parametrize._cache.pop(place.key) for place in places if place.key in parametrize._cache}
    try:
        for place, value in zip(places, values, strict=True):
            place.constant.__dict__["value"] = value  # past nn.Module, which would register a parameter
            place.parametrizations[place.name] = place.constant
        yield
    finally:
        for place, parametrization in zip(places, usual, strict=True):
            place.parametrizations[place.name] = parametrization
            place.constant.__dict__["value"] = None
            parametrize._cache.pop(place.key, None)
        parametrize._cache.update(cached)


def parametrizations_of(owner: nn.Module) -> dict[str, Any]:
    """What is parametrised in a module itself: name -> the parametrisation that is called for it."""
    found = owner._modules.get("parametrizations")
    return found._modules if isinstance(found, nn.ModuleDict) else {}
