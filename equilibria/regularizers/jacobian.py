"""Jacobian regularisation: a penalty on the size of ∂f/∂z at the fixed point, and when to apply it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from equilibria.compiled import as_written
from equilibria.declared import Declared
from equilibria.products import needs_autograd
from equilibria.solvers.solver import check_count
from equilibria.stopping import work_dtype
from equilibria.structure import layout_of


def jacobian_loss(
    f: Callable[..., Any],
    z: Any,
    *args: Any,
    probes: int = 1,
    per_sample: bool = False,
    detach: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Hutchinson's estimate of ‖J‖²_F / n, with J = ∂f/∂z at z and n the size of z: mean of (vᵀJ)², v ~ N(0, I).

    The spectral radius of J is at most ‖J‖_F; keeping it down keeps solves short and stable while f is trained. The
    estimate is unbiased for every number of probes, with variance 2 ‖JJᵀ‖²_F / (n² probes). Costs one evaluation of f and a
    vector-Jacobian product per probe, and the derivative of all of them in the backward pass. A compiled f runs uncompiled.

    Args:
        f: the map, f(z, *args) -> z. It treats samples independently.
        z: the fixed point: a tensor (B, ...) or a structure of them, all of whose entries count alike.
        args: the other arguments of f.
        probes: vectors v the estimate is averaged over.
        per_sample: return (B,), ‖J‖²_F / D of every sample with D entries, instead of its mean over samples.
        detach: take the point z as constant, so that gradients flow to args and to what f owns alone. False: they flow
            through z as well, for a z that is attached to autograd, and so through the backward pass of its solve.
        generator: source of v, on the device of z.

    Returns:
        A scalar, 0-dimensional, or (B,) with `per_sample`; float32 at least.

    Source: Bai, Koltun and Kolter 2021, "Stabilizing equilibrium models by Jacobian regularization", section 4; they take
    one probe and a constant z.

    >>> z = torch.randn(2, 3)
    >>> float(jacobian_loss(lambda z, a: a * z.sum(1, keepdim=True).expand(-1, 3), z, torch.zeros(()))) == 0.0
    True
    """
    check_count("jacobian_loss", "probes", probes, 1)
    needs_autograd("jacobian_loss")
    keep = torch.is_grad_enabled()
    layout = layout_of(z)
    declared = Declared(f, layout, args, None)
    with torch.enable_grad():
        point = layout.pack(z)
        if detach or not point.requires_grad:
            point = point.detach().requires_grad_()
        with as_written() if keep else nullcontext():
            output = declared(point, *declared.tensors)
        squares = point.new_zeros(layout.batch, dtype=work_dtype(layout.dtype))
        for _ in range(probes):
            v = torch.randn(point.shape, dtype=point.dtype, device=point.device, generator=generator)
            squares = squares + _product(output, point, v, keep).to(squares.dtype).square().mean(dim=1)
    losses = squares / probes  # (B,)
    losses = losses if keep else losses.detach()
    return losses if per_sample else losses.mean()


def _product(output: Tensor, point: Tensor, v: Tensor, create_graph: bool) -> Tensor:
    """vᵀ ∂output/∂point (B, D)."""
    if not output.requires_grad:  # f is a constant
        return torch.zeros_like(v)
    (product,) = torch.autograd.grad(
        output, point, v, create_graph=create_graph, retain_graph=True, materialize_grads=True
    )  # fmt: skip
    return product


@dataclass(frozen=True, kw_only=True)
class JacobianSchedule:
    """How much the Jacobian loss counts at each step of training.

    Before `start` and from `stop` on, nothing. In between, with probability `share` and independently at every step,

    weight(step) = weight + increment · ⌊(step - start) / every⌋,

    and nothing at the other steps. The loss is a safeguard and not the goal, so that a third of the steps serves nearly as
    well as all of them at a third of the cost; an equilibrium tends to become unstable late in training, so that the weight
    is raised over time. Whether a step is drawn depends on `seed` and the step alone: a run that is resumed, and every
    process of a distributed run, draws the same.

    Source: Bai, Koltun and Kolter 2021, section 4, for the random steps and the growing weight; in the code released with
    it, `increment` is 0.1, with e.g. weight 1.9, share 0.35 and every 35 000 steps on WikiText-103.

    >>> schedule = JacobianSchedule(weight=0.5, share=1.0, every=1000)
    >>> schedule(0), schedule(2500)
    (0.5, 0.7)
    """

    weight: float
    """Of `jacobian_loss` in the loss, at first."""
    share: float = 0.4
    """Of the steps, on average, those at which it is applied: 0 to 1."""
    increment: float = 0.1
    """Added to the weight every `every` steps."""
    every: int | None = None
    """Steps between two increments; None: the weight stays."""
    start: int = 0
    """First step at which it may be applied, such as the end of a warm-up without solves."""
    stop: int | None = None
    """First step at which it is applied no more; None: never."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("weight", "increment"):
            value = getattr(self, name)
            if not 0.0 <= value < float("inf"):
                raise ValueError(f"JacobianSchedule({name}={value}): {name} must be a finite number >= 0")
        if not 0.0 <= self.share <= 1.0:
            raise ValueError(f"JacobianSchedule(share={self.share}): share must lie in [0, 1]; 1 is every step")
        check_count("JacobianSchedule", "start", self.start, 0)
        check_count("JacobianSchedule", "seed", self.seed, 0)
        if self.every is not None:
            check_count("JacobianSchedule", "every", self.every, 1)
        if self.stop is not None:
            check_count("JacobianSchedule", "stop", self.stop, self.start)

    def __call__(self, step: int) -> float:
        """The weight at this step (0, 1, ...), 0.0 where the loss is not to be computed at all."""
        if step < self.start or (self.stop is not None and step >= self.stop) or not self._drawn(step):
            return 0.0
        raised = 0 if self.every is None else (step - self.start) // self.every
        return self.weight + self.increment * raised

    def _drawn(self, step: int) -> bool:
        # Neighbouring seeds of the generator give unrelated numbers: it mixes them before it starts.
        draw = torch.Generator().manual_seed((self.seed * 1_000_003 + step) % 2**63)
        return float(torch.rand((), generator=draw, dtype=torch.float64)) < self.share
