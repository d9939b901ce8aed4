"""Properties of every solve, on drawn structures, tolerances, budgets and batches."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from problems import Counted, affine_map, flat, normal, orthogonal, tanh_map
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten
from trees import trees

from equilibria import (
    GMRES,
    Anderson,
    Broyden,
    Implicit,
    Neumann,
    NewtonKrylov,
    Phantom,
    Picard,
    Shine,
    Status,
    Stopping,
    Unrolled,
    fixed_point,
)
from equilibria.stopping import Norm, l2, linf, rms

SOLVERS: dict[str, Any] = {
    "picard": Picard(),
    "picard damped": Picard(damping=0.6),
    "anderson": Anderson(),
    "anderson damped": Anderson(history=3, damping=0.6),
    "anderson, first type": Anderson(type=1),
    "broyden": Broyden(),
    "broyden put back": Broyden(divergence=10.0),
    "line search": Broyden(history=4, line_search=3),
    "newton": NewtonKrylov(),
    "gmres": GMRES(restart=4),
}
each_solver = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
# Those that spend evaluations for each sample alone.
PER_SAMPLE = {name: solver for name, solver in SOLVERS.items() if name not in ("gmres", "line search", "newton")}
each_per_sample = pytest.mark.parametrize("solver", PER_SAMPLE.values(), ids=PER_SAMPLE)
ADJOINTS: dict[str, Any] = {
    "implicit": Implicit(),
    "phantom": Phantom(),
    "unrolled": Unrolled(),
    "neumann": Neumann(),
}
each_adjoint = pytest.mark.parametrize("adjoint", ADJOINTS.values(), ids=ADJOINTS)


@dataclass
class Leaf:
    """The shape of one tensor of a state, behind the batch."""

    shape: tuple[int, ...]


leaves = st.lists(st.integers(1, 3), max_size=3).map(lambda shape: Leaf(tuple(shape)))
nested = trees(leaves, most=5)


class TestNested:
    @each_adjoint
    @settings(max_examples=15)
    @given(tree=nested, seed=st.integers(0, 100), name=st.sampled_from([name for name in SOLVERS if name != "gmres"]))
    def test_a_nested_state_is_solved_as_its_flat_form_bit_for_bit(
        self, adjoint: Any, tree: Any, seed: int, name: str
    ) -> None:
        """In value, statistics and gradient, though every part of the state acts on every other."""
        assume(name != "newton" or adjoint != Unrolled())  # NaN in a small space: see tests/test_theorems.py
        shapes, spec = tree_flatten(tree)
        sizes = [prod(leaf.shape) for leaf in shapes]
        ends = list(accumulate(sizes))

        def nest(z: Tensor) -> Any:
            parts = [z[:, end - size : end] for size, end in zip(sizes, ends, strict=True)]
            return tree_unflatten([p.reshape(len(z), *s.shape) for p, s in zip(parts, shapes, strict=True)], spec)

        W, x = 0.8 * orthogonal(sum(sizes), seed), normal(seed, 2, sum(sizes))
        options = {"solver": SOLVERS[name], "adjoint": adjoint, "stopping": Stopping(rtol=1e-6, max_evals=60)}
        found = []
        for f, z0 in ((tanh_map, 0 * x), (lambda z, W, x: nest(tanh_map(flat(z), W, x)), nest(0 * x))):
            weight = W.clone().requires_grad_()
            z, stats = fixed_point(f, z0, weight, x, **options)
            assert tree_flatten(z)[1] == tree_flatten(z0)[1]
            assert [leaf.shape for leaf in tree_flatten(z)[0]] == [leaf.shape for leaf in tree_flatten(z0)[0]]
            (gradient,) = torch.autograd.grad(flat(z).square().sum(), weight)
            found.append((flat(z), stats.residual, stats.relative, stats.steps, stats.status, gradient))
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_the_order_of_keys_is_no_part_of_a_state() -> None:
    a, b = torch.zeros(2, 3).double(), torch.zeros(2, 1).double()
    z = fixed_point(lambda z: {"b": torch.cos(z["b"]), "a": 0.5 * z["a"] + 1}, {"a": a, "b": b}).z
    assert list(z) == ["a", "b"]
    assert torch.allclose(z["a"], 2 + a, rtol=1e-2)
    assert torch.allclose(z["b"], 0.739 + b, rtol=1e-2)


def weighted(r: Tensor) -> Tensor:
    return (r.abs() * torch.linspace(0.5, 2.0, r.shape[1])).sum(1)


stoppings = st.builds(
    Stopping,
    rtol=st.sampled_from([0.0, 1e-11, 1e-6, 1e-3, 0.1]),
    atol=st.sampled_from([0.0, 1e-11, 1e-6, 1e-3, 0.1]),
    max_evals=st.integers(1, 60),
    norm=st.sampled_from([rms, l2, linf, weighted]),
    check_every=st.integers(1, 9),
    trace=st.booleans(),
)


def measure(norm: Norm, z: Tensor, *args: Tensor) -> tuple[Tensor, Tensor]:
    fz = affine_map(z, *args)
    return norm(fz - z), norm(fz)


class TestStopping:
    @each_solver
    @settings(max_examples=40)
    @given(
        stopping=stoppings,
        seed=st.integers(0, 1000),
        batch=st.integers(1, 4),
        size=st.integers(1, 6),
        radius=st.sampled_from([0.0, 0.3, 0.9, 1.1]),
    )
    def test_what_is_returned_is_what_is_claimed(
        self, solver: Any, stopping: Stopping, seed: int, batch: int, size: int, radius: float
    ) -> None:
        A, b = radius * orthogonal(size, seed), normal(seed, batch, size)
        f = Counted(affine_map)
        z, stats = fixed_point(f, normal(seed + 1, batch, size), A, b, solver=solver, stopping=stopping)
        residual, scale = measure(stopping.norm, z, A, b)
        rounding = 1e-14 * (1 + scale)
        tolerance = stopping.atol + stopping.rtol * scale
        assert z.isfinite().all()
        assert ((stats.residual - residual).abs() <= rounding).all()
        assert ((stats.relative * scale - residual).abs() <= rounding).all()
        assert f.calls <= stats.evaluations <= stopping.max_evals
        assert f.calls == stats.evaluations or isinstance(solver, NewtonKrylov)  # whose products count as well
        assert (stats.steps < stats.evaluations).all()
        converged = stats.status == Status.CONVERGED
        assert ((stats.status == Status.EXHAUSTED) | converged).all()
        assert (residual <= tolerance + rounding)[converged].all()
        assert (residual >= tolerance - rounding)[~converged].all()
        if not converged.all():
            # GMRES keeps one evaluation to measure its residual at the end, and gives up where that is rounding.
            known = isinstance(solver, GMRES)
            assert stats.evaluations >= stopping.max_evals - known or (known and (residual <= rounding).any())
        elif not getattr(solver, "line_search", 0):
            asked = -(-int(stats.steps.max()) // stopping.check_every) * stopping.check_every
            most = 1 + asked + (isinstance(solver, GMRES) and asked > 0)
            assert stats.evaluations == min(stopping.max_evals, most)
        assert (stats.trace is not None) == stopping.trace

    @each_per_sample
    @settings(max_examples=25)
    @given(
        seed=st.integers(0, 1000),
        budgets=st.tuples(st.integers(1, 40), st.integers(0, 20)),
        tolerances=st.tuples(st.floats(1e-12, 1.0), st.floats(0.0, 1.0)),
    )
    def test_more_budget_or_less_tolerance_returns_nothing_worse(
        self, solver: Any, seed: int, budgets: tuple[int, int], tolerances: tuple[float, float]
    ) -> None:
        W, x = 1.3 * orthogonal(4, seed), 2 * normal(seed, 3, 4)
        loose, tight = tolerances[0], tolerances[0] * tolerances[1]
        few, many = budgets[0], sum(budgets)

        def residual(atol: float, max_evals: int) -> Tensor:
            stopping = Stopping(rtol=0, atol=atol, max_evals=max_evals)
            return fixed_point(tanh_map, 0 * x, W, x, solver=solver, stopping=stopping).stats.residual

        assert (residual(tight, few) <= residual(loose, few)).all()
        assert (residual(loose, many) <= residual(loose, few)).all()

    @each_solver
    @settings(max_examples=15)
    @given(seed=st.integers(0, 1000), rtol=st.sampled_from([1e-10, 1e-5, 0.1]), norm=st.sampled_from([rms, l2, linf]))
    def test_a_solution_is_its_own_solution(self, solver: Any, seed: int, rtol: float, norm: Norm) -> None:
        """Searched from where a solve ended, the next ends at once, at the same z."""
        A, b = 0.6 * orthogonal(5, seed), normal(seed, 3, 5)
        f = affine_map if isinstance(solver, GMRES) else tanh_map
        stopping = Stopping(rtol=rtol, max_evals=300, norm=norm)
        first = fixed_point(f, 0 * b, A, b, solver=solver, stopping=stopping)
        again = fixed_point(f, first.z, A, b, solver=solver, stopping=stopping)
        assert first.stats.converged.all()
        assert again.stats.evaluations == 1
        assert again.stats.steps.tolist() == [0, 0, 0]
        assert torch.equal(again.z, first.z)
        assert torch.allclose(again.stats.residual, first.stats.residual, rtol=1e-9)


def pool(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Eight samples from easy to hard, and a W they share."""
    return 0.98 * orthogonal(12, seed), torch.linspace(0.0, 0.98, 8).double().unsqueeze(1), normal(seed, 8, 12)


def scaled_tanh(z: Tensor, W: Tensor, rates: Tensor, x: Tensor) -> Tensor:
    return rates * torch.tanh(z @ W.T + x)


BAD = (float("nan"), float("inf"), -float("inf"), 1e308)


class TestBatchIndependence:
    """Beside any neighbours, in any order, in a batch whole or shrinking, checked often or rarely: the same answer.

    Solved to 1e-4 and compared to 1e-9 (see tests/test_iterate.py, which compares samples alone and in batches).
    """

    @each_per_sample
    @each_adjoint
    @settings(max_examples=12)
    @given(
        seed=st.integers(0, 100),
        order=st.permutations(range(8)),
        bad=st.dictionaries(st.integers(1, 7), st.sampled_from(BAD), max_size=4),
        smaller=st.booleans(),
        check_every=st.integers(1, 5),
    )
    def test_value_and_gradient_of_a_sample(
        self, solver: Any, adjoint: Any, seed: int, order: list[int], bad: dict[int, float], smaller: bool, check_every: int
    ) -> None:
        W, rates, x = pool(seed)
        stopping = Stopping(rtol=1e-4, max_evals=40, check_every=check_every)
        options = {"solver": solver, "adjoint": adjoint, "stopping": stopping, "raise_nonfinite": False}
        mine = rates[:1] + 0.9, x[:1].clone().requires_grad_()
        alone, stats_alone = fixed_point(scaled_tanh, 0 * mine[1], W, *mine, **options)
        (expected,) = torch.autograd.grad(alone.sum(), mine[1])

        for place, value in bad.items():
            x[place], rates[place] = value, 1.0
        rates[0] += 0.9
        place = order.index(0)
        mixed = x[order].requires_grad_()
        dims = (None, 0, 0) if smaller else None
        z, stats = fixed_point(scaled_tanh, torch.zeros(8, 12).double(), W, rates[order], mixed, batch_dims=dims, **options)
        (gradient,) = torch.autograd.grad(z[place].sum(), mixed)
        assert (stats.status[place], stats.steps[place]) == (stats_alone.status[0], stats_alone.steps[0])
        assert torch.allclose(z[place], alone[0], rtol=1e-9, atol=1e-9)
        assert torch.allclose(gradient[place], expected[0], rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("solver", [Anderson(), Broyden()], ids=["anderson", "broyden"])
    @pytest.mark.parametrize(
        ("check_every", "bad"),
        [
            (1, None),
            (1, 1e308),
            (3, None),
            (1, BAD[0]),
        ],
    )
    def test_gradient_by_an_estimate(self, solver: Any, check_every: int, bad: float | None) -> None:
        """What the solver learnt of a sample does not depend on its neighbours either."""
        W, rates, x = pool(0)
        rates[0] += 0.9
        stopping = Stopping(rtol=1e-4, max_evals=40, check_every=check_every)
        options = {"solver": solver, "adjoint": Shine(), "stopping": stopping, "raise_nonfinite": False}
        x = x.requires_grad_()
        (alone,) = torch.autograd.grad(fixed_point(scaled_tanh, 0 * x[:1], W, rates[:1], x[:1], **options).z.sum(), x)
        with torch.no_grad():
            x[3] = x[3] if bad is None else bad
        z = fixed_point(scaled_tanh, torch.zeros(8, 12).double(), W, rates, x, **options).z
        others = [i for i in range(8) if i != 3]
        assert torch.allclose(torch.autograd.grad(z[0].sum(), x)[0][others], alone[others], rtol=1e-8, atol=1e-8)
