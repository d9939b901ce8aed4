"""Which derivatives a tensor carries. The only file that looks inside torch.func, for which torch has no public way.

Under torch.func a tensor is wrapped once for every transform it belongs to, and those that are running form a stack with
the innermost on top. Below, "this level" is the top of that stack, or plain autograd where nothing is running.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack as one_level_down
from torch.autograd import forward_ad
from torch.utils._pytree import tree_map_only

_functorch: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]


def transformed() -> bool:
    """Whether a torch.func transform is running: tensors may then hide a batch, and plain loops over them fail."""
    return _functorch.peek_interpreter_stack() is not None


def hides_batch() -> bool:
    """Whether torch.vmap is running, so that no Python value can be had from a tensor it batches."""
    stack = _functorch.get_interpreter_stack() or []
    return any(interpreter.key() == _functorch.TransformType.Vmap for interpreter in stack)


def through_old_vmap(f: Callable[..., Any], *tensors: Tensor) -> Any:
    """f(*tensors), where PyTorch's older vmap may have hidden a batch in the tensors: f then runs under torch.vmap.

    That of `is_grads_batched`, `functional.jacobian(..., vectorize=True)` and gradcheck, of which torch.func knows nothing.
    """
    if not any(map(_functorch.is_legacy_batchedtensor, tensors)):
        return f(*tensors)
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    old: Any = torch
    dims = tuple(0 if _functorch.is_legacy_batchedtensor(t) else None for t in tensors)
    # The size passed matters only for tensors that hide no batch.
    shown = [t if dim is None else old._remove_batch_dim(t, level, 1, 0) for t, dim in zip(tensors, dims, strict=True)]
    return tree_map_only(Tensor, lambda t: old._add_batch_dim(t, 0, level), torch.vmap(f, in_dims=dims)(*shown))


def blind() -> bool:
    """Whether no value may be had from a tensor: a graph that is being traced has none yet, and a hidden batch has many."""
    return torch.compiler.is_compiling() or hides_batch()


def reverse_alone() -> bool:
    """Whether derivatives are those of plain autograd in reverse mode, if there are any."""
    return not transformed() and forward_ad._current_level < 0


def differentiating() -> bool:
    """Whether derivatives are wanted at all: torch.no_grad() switches off reverse mode, but not forward mode."""
    return torch.is_grad_enabled() or forward_ad._current_level >= 0


def forward_modes() -> int:
    """How many forward-mode transforms are running, one inside the other."""
    stack = _functorch.get_interpreter_stack() or []
    return sum(interpreter.key() == _functorch.TransformType.Jvp for interpreter in stack)


def without_derivatives(t: Tensor) -> Tensor:
    """t, detached at every level; a batch hidden by vmap stays hidden."""
    top = _functorch.peek_interpreter_stack()
    if top is None:
        return t.detach()
    level = top.level()
    here = _functorch.maybe_get_level(t) == level
    dim = _functorch.maybe_get_bdim(t) if here and _functorch.is_batchedtensor(t) else None
    with one_level_down():
        inner = without_derivatives(_functorch.get_unwrapped(t) if here else t)
    return inner if dim is None else _functorch._add_batch_dim(inner, dim, level)


def carries_derivatives(t: Tensor) -> bool:
    """Whether t is recorded by autograd or has a tangent, at any level."""
    top = _functorch.peek_interpreter_stack()
    here = top is None or _functorch.maybe_get_level(t) == top.level()
    if here and not _functorch.is_batchedtensor(t):
        if t.requires_grad:
            return True
        dual_level = forward_ad._current_level if top is None else 0
        if dual_level >= 0 and forward_ad.unpack_dual(t, level=dual_level).tangent is not None:
            return True
    if top is None:
        return False
    with one_level_down():
        return carries_derivatives(_functorch.get_unwrapped(t) if here else t)


def recorded(*tensors: Tensor) -> bool:
    """Whether reverse or forward mode follows these tensors, so that nothing may be overwritten."""
    return differentiating() and any(map(carries_derivatives, tensors))


def nodes_behind(output: Tensor) -> Iterator[Any]:
    """The nodes of the graph behind a tensor."""
    seen, queue = set(), [output.grad_fn]
    while queue:
        node = queue.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            queue.extend(parent for parent, _ in node.next_functions)
