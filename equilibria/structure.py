"""Nested states <-> one (B, D) tensor, once, at the boundary.

Solvers see a state as one matrix: a row for each sample of the batch. Users may hold it as a tensor of any shape, or as a
tuple, list, dict or named tuple of such tensors, each with the batch first.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, keystr, tree_flatten, tree_flatten_with_path, tree_unflatten

_LEAF = tree_flatten(torch.empty(0))[1]
"""The structure of a state that is a single tensor: most are, and need not be looked through."""


@dataclass(frozen=True)
class Layout:
    """How a state is laid out: its structure, the shape of each tensor behind the batch dimension, and what z0 was."""

    spec: TreeSpec
    shapes: tuple[torch.Size, ...]
    paths: tuple[str, ...]
    dtype: torch.dtype
    device: torch.device
    batch: int

    def pack(self, state: Any) -> Tensor:
        """(B, D): the tensors of `state`, flattened and side by side."""
        if isinstance(state, Tensor):
            return state if state.dim() == 2 else state.reshape(state.shape[0], prod(self.shapes[0]))
        leaves = tree_flatten(state)[0]
        flat = [leaf.reshape(leaf.shape[0], prod(shape)) for leaf, shape in zip(leaves, self.shapes, strict=True)]
        return flat[0] if len(flat) == 1 else torch.cat(flat, dim=1)

    def unpack(self, flat: Tensor) -> Any:
        """The inverse of `pack`: views into `flat` (B, D)."""
        batch = flat.shape[0]
        if self.spec.is_leaf():
            return flat if len(self.shapes[0]) == 1 else flat.reshape(batch, *self.shapes[0])
        if len(self.shapes) == 1:
            leaves = [flat.reshape(batch, *self.shapes[0])]
        else:
            parts = flat.split([prod(shape) for shape in self.shapes], dim=1)
            leaves = [part.reshape(batch, *shape) for part, shape in zip(parts, self.shapes, strict=True)]
        return tree_unflatten(leaves, self.spec)

    def pack_output(self, output: Any, batch: int) -> Tensor:
        """`pack` for what f returned, refused unless structure, shapes and dtype are those of the state."""
        if isinstance(output, Tensor):
            leaves, spec = [output], _LEAF
        else:
            leaves, spec = tree_flatten(output)
        if spec != self.spec:
            output = _in_order_of(tree_unflatten(self.paths, self.spec), output)
            leaves, spec = tree_flatten(output)
        if spec != self.spec:
            raise ValueError(
                f"f returned the structure {_describe(output)} for a state with the tensors "
                f"{', '.join(self.paths) or 'z'}; return the structure of z0"
            )
        for leaf, shape, path in zip(leaves, self.shapes, self.paths, strict=True):
            if not isinstance(leaf, Tensor):
                raise TypeError(f"f returned a {type(leaf).__name__} for {path}; return a tensor")
            if leaf.shape != (batch, *shape):
                raise ValueError(
                    f"f returned shape {tuple(leaf.shape)} for {path} of shape {(batch, *shape)}; "
                    "f must map a state to a state of the same shape"
                )
            if leaf.dtype != self.dtype:
                raise ValueError(
                    f"f returned {leaf.dtype} for {path} of {self.dtype}; cast inside f, or give z0 in {leaf.dtype}"
                )
        return self.pack(output)


def layout_of(z0: Any) -> Layout:
    """The layout of an initial state; raises where z0 cannot be a state."""
    if isinstance(z0, Tensor):
        leaves, paths, spec = [z0], ("z",), _LEAF
    else:
        pairs, spec = tree_flatten_with_path(z0)
        paths, leaves = tuple(f"z{keystr(path)}" for path, _ in pairs), [leaf for _, leaf in pairs]
    if not leaves:
        raise ValueError("z0 holds no tensor; give a tensor with the batch first, or a structure of such tensors")
    for leaf, path in zip(leaves, paths, strict=True):
        if not isinstance(leaf, Tensor):
            raise TypeError(f"z0 holds a {type(leaf).__name__} at {path}; a state is made of tensors alone")
        if not leaf.dtype.is_floating_point:
            raise TypeError(f"{path} is {leaf.dtype}; a state must be of a real floating-point dtype: z0.float()")
        if leaf.dim() == 0:
            raise ValueError(f"{path} has no dimension; the batch comes first: z0.unsqueeze(0)")
        if leaf.numel() == 0:
            raise ValueError(f"{path} has shape {tuple(leaf.shape)}: nothing to solve; skip the call for an empty batch")
    first = leaves[0]
    for leaf, path in zip(leaves[1:], paths[1:], strict=True):
        for what, here, there in (
            ("batch size", leaf.shape[0], first.shape[0]),
            ("dtype", leaf.dtype, first.dtype),
            ("device", leaf.device, first.device),
        ):
            if here != there:
                raise ValueError(f"{path} has {what} {here} and {paths[0]} has {there}; all tensors of z0 must agree")
    return Layout(spec, tuple(leaf.shape[1:] for leaf in leaves), paths, first.dtype, first.device, first.shape[0])


def _in_order_of(model: Any, tree: Any) -> Any:
    """`tree`, with the keys of its dicts in the order that they have in `model`, where they are the same."""
    if type(model) is not type(tree):
        return tree
    if isinstance(tree, dict) and model.keys() == tree.keys():
        return type(tree)((key, _in_order_of(value, tree[key])) for key, value in model.items())
    if type(tree) in (list, tuple) and len(model) == len(tree):
        return type(tree)(_in_order_of(a, b) for a, b in zip(model, tree, strict=True))
    return tree


def _describe(tree: Any) -> str:
    if isinstance(tree, Tensor):
        return "tensor"
    if isinstance(tree, dict):
        return "{" + ", ".join(f"{k!r}: {_describe(v)}" for k, v in tree.items()) + "}"
    if isinstance(tree, (tuple, list)):
        inside = ", ".join(_describe(v) for v in tree)
        return f"({inside})" if isinstance(tree, tuple) else f"[{inside}]"
    return type(tree).__name__
