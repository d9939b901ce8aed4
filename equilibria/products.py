"""Products with a Jacobian from reverse passes alone, for forward modes do not nest inside one another."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from equilibria.compiled import as_written
from equilibria.transforms import nodes_behind, reverse_alone


def linearize(f: Callable[..., Tensor], *primals: Tensor) -> tuple[Tensor, Callable[..., Tensor]]:
    """f(*primals), and the map of tangents to J · tangents, where J is the Jacobian of f at the primals.

    The pullback w -> wᵀJ is linear in w, so that its own pullback is J. f is evaluated once; each product is one pass
    backward over the record of the pullback. Both are differentiable where gradients are recorded.

    >>> value, push = linearize(torch.sin, torch.zeros(2))
    >>> push(torch.ones(2))
    tensor([1., 1.])
    """
    needs_autograd("a product with the Jacobian")
    with as_written():
        return _by_autograd(f, primals) if reverse_alone() else _by_func(f, primals)


def needs_autograd(what: str) -> None:
    """Refuse inference mode, where autograd records nothing and every derivative would look like that of a constant."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            f"{what} needs autograd, which torch.inference_mode() switches off for good: use torch.no_grad() instead"
        )


def _by_func(f: Callable[..., Tensor], primals: tuple[Tensor, ...]) -> tuple[Tensor, Callable[..., Tensor]]:
    value, pullback, *_ = torch.func.vjp(f, *primals)
    push = torch.func.vjp(pullback, torch.zeros_like(value))[1]
    return value, lambda *tangents: push(tangents)[0]


def _by_autograd(f: Callable[..., Tensor], primals: tuple[Tensor, ...]) -> tuple[Tensor, Callable[..., Tensor]]:
    """The same in reverse mode alone, without torch.func, which refuses to work inside of activation checkpointing."""
    keep = torch.is_grad_enabled()
    with torch.enable_grad():
        points = [p if keep and p.requires_grad else p.detach().requires_grad_() for p in primals]
        value = f(*(p.clone() for p in points))  # copies: autograd has an error of its own for an f that writes into a leaf
        keep = keep and _leads_elsewhere(value, [p for p, primal in zip(points, primals, strict=True) if p is not primal])
        w = torch.zeros_like(value).requires_grad_()
        pulled: list[Tensor] = []
        if value.requires_grad:  # otherwise f is a constant
            pulled = list(torch.autograd.grad(value, points, w, create_graph=True, materialize_grads=True))

    def push(*tangents: Tensor) -> Tensor:
        pairs = [(p, t) for p, t in zip(pulled, tangents, strict=False) if p.requires_grad]
        if not pairs:
            return torch.zeros_like(value)
        outputs, cotangents = zip(*pairs, strict=True)
        (product,) = torch.autograd.grad(
            outputs, w, cotangents, create_graph=keep, retain_graph=True, materialize_grads=True
        )
        return product

    return value if keep else value.detach(), push


def _leads_elsewhere(value: Tensor, points: list[Tensor]) -> bool:
    """Whether gradients of the value have anywhere to go but to these points, which were made here."""
    made = {id(point) for point in points}
    leaves = (node.variable for node in nodes_behind(value) if hasattr(node, "variable"))
    return any(id(leaf) not in made for leaf in leaves)
