"""Contenders in PyTorch: this library and TorchDEQ."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from equilibria import Anderson, Broyden, NewtonKrylov, Picard, Stopping, fixed_point
from peers.check import Found
from peers.contender import Bound, Contender, Scale
from peers.problems import Problem


class Counted:
    """f, counted."""

    def __init__(self, f: Callable[..., Tensor]) -> None:
        self.f, self.calls = f, 0

    def __call__(self, z: Tensor, *args: Tensor) -> Tensor:
        self.calls += 1
        return self.f(z, *args)


@cache
def _compiled(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(f, dynamic=False)


def map_of(problem: Problem, compiled: bool) -> Callable[..., Tensor]:
    return _compiled(problem.torch_map) if compiled else problem.torch_map


# This library


def _ours(solver: Any, compiled: bool, problem: Problem, scale: Scale) -> Bound:
    args, z0 = problem.torch_args(), torch.zeros(problem.shape)
    f = map_of(problem, compiled)

    @torch.no_grad()
    def run(f: Callable[..., Tensor], tolerance: float, budget: int) -> Any:
        return fixed_point(
            f, z0, *args, solver=solver, batch_dims=problem.batch_dims, raise_nonfinite=False,
            stopping=Stopping(rtol=tolerance, atol=0.0, max_evals=budget),
        )  # fmt: skip

    def solve(tolerance: float, budget: int) -> Found:
        z, stats = run(f, tolerance, budget)
        return Found(z=z.numpy(), evaluations=stats.evaluations, exhausted=stats.evaluations >= budget)

    return Bound(solve=solve, timed=lambda tolerance, budget: partial(run, f, tolerance, budget), base=lambda rtol: rtol)


def one_graph(solve: Callable[..., Any]) -> Callable[..., Any]:
    """A solve compiled as one graph, with a cache of its own: else each call looks through those of all others."""
    solve.__code__ = solve.__code__.replace()
    return torch.compile(solve, fullgraph=True, dynamic=False, options={"cpp_wrapper": True})


def _ours_as_one_graph(solver: Any, problem: Problem, scale: Scale) -> Bound:
    args, z0 = problem.torch_args(), torch.zeros(problem.shape)

    @cache
    def made(tolerance: float, budget: int) -> Callable[[], tuple[Tensor, Tensor]]:
        stopping = Stopping(rtol=tolerance, atol=0.0, max_evals=budget)

        def whole(z0: Tensor, *args: Tensor) -> tuple[Tensor, Tensor]:
            z, stats = fixed_point(problem.torch_map, z0, *args, solver=solver, stopping=stopping)
            return z, stats.steps

        graph = one_graph(whole)

        @torch.no_grad()
        def run() -> tuple[Tensor, Tensor]:
            return graph(z0, *args)

        return run

    def solve(tolerance: float, budget: int) -> Found:
        z, steps = made(tolerance, budget)()
        evaluations = 1 + int(steps.max())
        return Found(z=z.numpy(), evaluations=evaluations, exhausted=evaluations >= budget)

    return Bound(solve=solve, timed=made, base=lambda rtol: rtol)


OURS = {
    "Anderson()": Anderson(),
    "Anderson(history=5)": Anderson(history=5),
    "Anderson(history=250)": Anderson(history=250),
    "Anderson(type=2, history=10)": Anderson(type=2, history=10),
    "Broyden()": Broyden(),
    "Broyden(history=20)": Broyden(history=20),
    "Picard()": Picard(),
    "NewtonKrylov()": NewtonKrylov(),
}
AS_ONE_GRAPH = {
    "Anderson(type=2, history=5)": Anderson(type=2, history=5),
    "Broyden(history=10)": Broyden(history=10),
    "Picard()": Picard(),
}


def equilibria(compiled_too: Callable[[Problem], bool]) -> list[Contender]:
    found = []
    for name, solver in OURS.items():
        found.append(Contender(name=name, library="equilibria", bind=partial(_ours, solver, False), exact=True))
        if name in ("Anderson()", "Broyden()", "Picard()"):
            found.append(
                Contender(
                    name=f"{name}, f compiled", library="equilibria", bind=partial(_ours, solver, True), exact=True,
                    fits=compiled_too,
                )
            )  # fmt: skip
    for name, solver in AS_ONE_GRAPH.items():
        bind = partial(_ours_as_one_graph, solver)
        found.append(Contender(name=f"{name}, one graph", library="equilibria", bind=bind, exact=True))
    return found


# TorchDEQ


def _torchdeq(solver: str, options: dict[str, Any], compiled: bool, problem: Problem, scale: Scale) -> Bound:
    get_deq: Any = importlib.import_module("torchdeq").get_deq
    args, z0 = problem.torch_args(), torch.zeros(problem.shape)
    plain = map_of(problem, compiled)

    def made(f: Callable[..., Tensor], tolerance: float, budget: int) -> Callable[[], Any]:
        deq = get_deq(f_solver=solver, f_max_iter=budget, f_tol=tolerance, f_stop_mode="rel").eval()

        @torch.no_grad()
        def run() -> Any:
            return deq(lambda z: f(z, *args), z0, solver_kwargs=options)[0][-1]

        return run

    def solve(tolerance: float, budget: int) -> Found:
        counted = Counted(plain)
        z = made(counted, tolerance, budget)()
        return Found(z=z.numpy(), evaluations=counted.calls, exhausted=counted.calls >= budget)

    return Bound(solve=solve, timed=partial(made, plain), base=lambda rtol: rtol)


TORCHDEQ: dict[str, tuple[str, dict[str, Any]]] = {
    "fixed_point_iter": ("fixed_point_iter", {}),
    **{
        f"anderson(m={m}, lam={lam:g})": ("anderson", {"m": m, "lam": lam})
        for m, lam in ((6, 1e-4), (3, 1e-10), (6, 1e-10), (15, 1e-8))
    },
    "broyden": ("broyden", {}),
}


def torchdeq(compiled_too: Callable[[Problem], bool]) -> list[Contender]:
    found = []
    for name, (solver, options) in TORCHDEQ.items():
        for compiled in (False, True):
            found.append(
                Contender(
                    name=f"{name}{', f compiled' if compiled else ''}", library="torchdeq",
                    bind=partial(_torchdeq, solver, options, compiled),
                    fits=compiled_too if compiled else lambda problem: True,
                )
            )  # fmt: skip
    return found
