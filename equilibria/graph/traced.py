"""f as a pure function of explicit tensors, in code that torch.compile can trace: see `equilibria.declared`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from equilibria.declared import autocast_now
from equilibria.structure import Layout


class Traced:
    """The map z, *tensors -> f(z, *args) on flat states (B, D), and the tensors it is to be called with."""

    def __init__(self, f: Callable[..., Any], layout: Layout, args: Sequence[Any]) -> None:
        self.f, self.layout, self.args = f, layout, args
        self.autocast = autocast_now(layout.device)
        self.leaves, self.spec = tree_flatten(tuple(args))
        self.places = [i for i, leaf in enumerate(self.leaves) if isinstance(leaf, Tensor)]
        owned = list(f.parameters()) if isinstance(f, nn.Module) else []
        self.slots = _slots(f, owned) if isinstance(f, nn.Module) else {}
        self.tensors: tuple[Tensor, ...] = (*(self.leaves[i] for i in self.places), *owned)

    def __call__(self, z: Tensor, *tensors: Tensor) -> Tensor:
        """f with these tensors in the place of `self.tensors`; inside a loop, too, it may ask for the .T of one.

        Each is viewed, for the compiler takes an attribute of what comes from outside of a loop out of it, and out of vjp.
        """
        tensors = tuple(tensor.view_as(tensor) for tensor in tensors)
        leaves = list(self.leaves)
        for place, tensor in zip(self.places, tensors, strict=False):
            leaves[place] = tensor
        args = tree_unflatten(leaves, self.spec)
        if not isinstance(self.f, nn.Module):
            return self._evaluated(self.f, z, args)
        module, values = self.f, {name: tensors[len(self.places) + i] for name, i in self.slots.items()}
        return self._evaluated(
            lambda *inputs: torch.func.functional_call(module, values, inputs, tie_weights=False), z, args
        )

    def as_given(self, z: Tensor) -> Tensor:
        """f with the very tensors that the caller passed."""
        return self._evaluated(self.f, z, self.args)

    def _evaluated(self, f: Callable[..., Any], z: Tensor, args: Sequence[Any]) -> Tensor:
        with self.autocast or nullcontext():
            output = f(self.layout.unpack(z), *args)
        if self.autocast is not None:
            output = tree_map_only(Tensor, lambda leaf: leaf.to(self.layout.dtype), output)
        return self.layout.pack_output(output, self.layout.batch)


def _slots(module: nn.Module, parameters: Sequence[Tensor]) -> dict[str, int]:
    """The name of every slot that holds a parameter, and which of these it holds: tied weights have several slots."""
    which = {parameter: i for i, parameter in enumerate(parameters)}
    return {
        f"{path}.{name}" if path else name: which[parameter]
        for path, part in module.named_modules()  # each once, under however many names it is registered
        for name, parameter in part.named_parameters(recurse=False)
    }
