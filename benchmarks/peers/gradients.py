"""Contenders of solve and backward pass: the gradient of <w, z> in the leaves, by implicit differentiation in each."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from equilibria import Anderson, Broyden, Implicit, Picard, Stopping, fixed_point
from peers.check import Found
from peers.contender import Bound, Contender, Scale
from peers.problems import Problem
from peers.torch_solvers import AS_ONE_GRAPH, Counted, map_of, one_graph

CONSTANT = ("mask",)
"""Leaves without a gradient."""
BACKWARD = 300
"""Most vector-Jacobian products."""


def weights_of(problem: Problem) -> np.ndarray:
    """w of the loss <w, z>."""
    return np.random.default_rng(0).standard_normal(problem.shape).astype(np.float32)


@dataclass(frozen=True)
class Taped:
    """A problem whose leaves want gradients."""

    problem: Problem
    dtype: torch.dtype = torch.float32

    def __call__(self, solve: Callable[[tuple[Tensor, ...]], Tensor]) -> Callable[[], tuple[Tensor, tuple[Tensor, ...]]]:
        """`solve(args) -> z` becomes a run that returns z and the gradients."""
        leaves = self.problem.torch_leaves(self.dtype)
        named = zip(self.problem.leaves, leaves, strict=True)
        wanted = [leaf.requires_grad_() for name, leaf in named if name not in CONSTANT]
        w = torch.from_numpy(weights_of(self.problem)).to(self.dtype)

        def run() -> tuple[Tensor, tuple[Tensor, ...]]:
            z = solve(self.problem.prepare(*leaves))
            return z, torch.autograd.grad((w * z).sum(), wanted)

        return run


def exact(problem: Problem) -> list[np.ndarray]:
    """The gradients of a solve in float64 to 1e-8, forward and backward."""
    stopping = Stopping(rtol=1e-8, max_evals=5000)
    z0, all_stats = torch.zeros(problem.shape, dtype=torch.float64), []

    def solve(args: tuple[Tensor, ...]) -> Tensor:
        adjoint = Implicit(stopping=stopping)
        z, stats = fixed_point(problem.torch_map, z0, *args, stopping=stopping, adjoint=adjoint)
        all_stats.append(stats)
        return z

    _, gradients = Taped(problem, torch.float64)(solve)()
    if not (all_stats[0].converged.all() and all_stats[0].backward[0].converged.all()):
        raise RuntimeError(f"the gradient of {problem.name} was not found in float64")
    return [g.numpy() for g in gradients]


def _found(z: Tensor, gradients: Sequence[Tensor], forward: int, backward: int | None, budget: int) -> Found:
    return Found(
        z=z.detach().numpy(), gradients=tuple(g.numpy() for g in gradients), evaluations=forward, products=backward,
        exhausted=forward >= budget,
    )  # fmt: skip


def _ours(solver: Any, backward: Any, compiled: bool, problem: Problem, scale: Scale) -> Bound:
    f, z0, seen = map_of(problem, compiled), torch.zeros(problem.shape), []

    def made(tolerance: float, budget: int) -> Callable[[], tuple[Tensor, tuple[Tensor, ...]]]:
        there = Stopping(rtol=tolerance, atol=0.0, max_evals=budget)
        back = Implicit(stopping=Stopping(rtol=tolerance, max_evals=BACKWARD), **({"solver": backward} if backward else {}))

        def solve(args: tuple[Tensor, ...]) -> Tensor:
            z, stats = fixed_point(
                f, z0, *args, solver=solver, stopping=there, adjoint=back, batch_dims=problem.batch_dims,
                raise_nonfinite=False,
            )  # fmt: skip
            seen[:] = [stats]
            return z

        return Taped(problem)(solve)

    def solve(tolerance: float, budget: int) -> Found:
        z, gradients = made(tolerance, budget)()
        return _found(z, gradients, seen[0].evaluations, seen[0].backward[0].evaluations, budget)

    return Bound(solve=solve, timed=made, base=lambda rtol: rtol)


def _ours_as_one_graph(solver: Any, problem: Problem, scale: Scale) -> Bound:
    z0, steps = torch.zeros(problem.shape), []

    @cache
    def made(tolerance: float, budget: int) -> Callable[[], tuple[Tensor, tuple[Tensor, ...]]]:
        there = Stopping(rtol=tolerance, atol=0.0, max_evals=budget)
        back = Implicit(solver=solver, stopping=Stopping(rtol=tolerance, max_evals=BACKWARD))

        def whole(z0: Tensor, *args: Tensor) -> tuple[Tensor, Tensor]:
            z, stats = fixed_point(problem.torch_map, z0, *args, solver=solver, stopping=there, adjoint=back)
            return z, stats.steps

        graph = one_graph(whole)

        def solve(args: tuple[Tensor, ...]) -> Tensor:
            z, taken = graph(z0, *args)
            steps[:] = [taken]
            return z

        return Taped(problem)(solve)

    def solve(tolerance: float, budget: int) -> Found:
        z, gradients = made(tolerance, budget)()
        return _found(z, gradients, 1 + int(steps[0].max()), None, budget)

    return Bound(solve=solve, timed=made, base=lambda rtol: rtol)


def _torchdeq(solver: str, options: dict[str, Any], mode: str, compiled: bool, problem: Problem, scale: Scale) -> Bound:
    get_deq: Any = importlib.import_module("torchdeq").get_deq
    plain, z0 = map_of(problem, compiled), torch.zeros(problem.shape)
    steps: list[int] = []

    def made(f: Callable[..., Tensor], tolerance: float, budget: int) -> Callable[[], tuple[Tensor, tuple[Tensor, ...]]]:
        deq = get_deq(
            f_solver=solver, b_solver=solver, f_max_iter=budget, b_max_iter=min(budget, BACKWARD), f_tol=tolerance,
            b_tol=tolerance, f_stop_mode="rel", b_stop_mode="rel", **{mode: True},
        ).train()  # fmt: skip

        def solve(args: tuple[Tensor, ...]) -> Tensor:
            writer = None if f is plain else lambda info: steps.append(int(info["nstep"].max()))
            return deq(lambda z: f(z, *args), z0, solver_kwargs=options, backward_writer=writer)[0][-1]

        return Taped(problem)(solve)

    def solve(tolerance: float, budget: int) -> Found:
        counted = Counted(plain)
        z, gradients = made(counted, tolerance, budget)()
        return _found(z, gradients, counted.calls, steps[-1], budget)

    return Bound(solve=solve, timed=partial(made, plain), base=lambda rtol: rtol)


def in_torch(compiled_too: Callable[[Problem], bool]) -> list[Contender]:
    found = [
        Contender(
            name=f"{name}, Implicit({name}), one graph", library="equilibria", bind=partial(_ours_as_one_graph, solver)
        )
        for name, solver in AS_ONE_GRAPH.items()
    ]
    ours = {
        "Anderson(), Implicit()": (Anderson(), None),
        "Anderson(history=5), Implicit()": (Anderson(history=5), None),
        "Broyden(), Implicit()": (Broyden(), None),
        "Picard(), Implicit()": (Picard(), None),
        "Picard(), Implicit(Picard())": (Picard(), Picard()),
    }
    theirs = {
        "fixed_point_iter": ("fixed_point_iter", {}), "anderson(m=6)": ("anderson", {"m": 6}),
        "anderson(m=6, lam=1e-10 forward)": ("anderson", {"m": 6, "lam": 1e-10}), "broyden": ("broyden", {}),
    }  # fmt: skip
    for compiled in (False, True):
        fits, how = (compiled_too, ", f compiled") if compiled else (lambda problem: True, "")
        for name, (solver, backward) in ours.items():
            bind = partial(_ours, solver, backward, compiled)
            found.append(Contender(name=name + how, library="equilibria", bind=bind, fits=fits))
        for name, (solver, options) in theirs.items():
            for mode in ("ift", "hook_ift"):
                bind = partial(_torchdeq, solver, options, mode, compiled)
                found.append(Contender(name=f"{name}, {mode}{how}", library="torchdeq", bind=bind, fits=fits))
    return found


# JAX


def _in_jax(made: Callable[..., Any], per_sample: bool, base: Any, problem: Problem, scale: Scale) -> Bound:
    """`made(f, tolerance, budget)` is (z0, args) -> z, differentiable in args."""
    jax, jnp = importlib.import_module("jax"), importlib.import_module("jax.numpy")
    axes = (0, *problem.batch_dims)
    batched = jax.vmap(problem.jax_map, in_axes=axes)
    names, z0 = list(problem.leaves), jnp.zeros(problem.shape, jnp.float32)
    arrays = {name: jnp.asarray(leaf) for name, leaf in problem.leaves.items()}
    constant = {name: arrays.pop(name) for name in CONSTANT if name in arrays}
    w = jnp.asarray(weights_of(problem))

    def loss(budget: int, leaves: Any, tolerance: Any) -> Any:
        args = problem.prepare(*({**leaves, **constant}[name] for name in names))
        if per_sample:
            one = made(lambda z, args: problem.jax_map(z, *args), tolerance, budget)
            z = jax.vmap(one, in_axes=(0, problem.batch_dims))(z0, args)
        else:
            z = made(lambda z, args: batched(z, *args), tolerance, budget)(z0, args)
        return (w * z).sum(), z

    @cache
    def compiled(budget: int) -> Any:
        return jax.jit(jax.value_and_grad(partial(loss, budget), has_aux=True))

    def run(tolerance: Any, budget: int) -> Any:
        return jax.block_until_ready(compiled(budget)(arrays, tolerance))

    def solve(tolerance: float, budget: int) -> Found:
        (_, z), gradients = run(np.float32(tolerance), budget)
        found = tuple(np.asarray(gradients[name]) for name in names if name in gradients)
        return Found(z=np.asarray(z), evaluations=None, gradients=found)

    return Bound(
        solve=solve, timed=lambda tolerance, budget: partial(run, np.float32(tolerance), budget),
        base=partial(base, scale, per_sample),
    )  # fmt: skip


def in_jax() -> list[Contender]:
    from peers import jax_solvers as js

    linear = importlib.import_module("jaxopt").linear_solve
    jaxopt, optx, lx = js.jaxopt, js.optx, js.lx

    def of_jaxopt(
        solver: str, options: dict[str, Any], backward: str, scaled: Any, f: Any, tolerance: Any, budget: int
    ) -> Any:
        # A linear solver measures the relative residual; its tolerance is the forward one made relative again.
        solve = partial(getattr(linear, backward), tol=tolerance / scaled, maxiter=BACKWARD)
        g = (lambda z, args: z - f(z, args)) if solver == "Broyden" else f
        made = getattr(jaxopt, solver)(g, maxiter=budget, tol=tolerance, implicit_diff_solve=solve, **options)
        return lambda z0, args: made.run(z0, args).params

    def of_optimistix(make: Any, adjoint: Any, scaled: Any, f: Any, tolerance: Any, budget: int) -> Any:
        solver = make(tolerance)
        steps = budget if isinstance(solver, optx.FixedPointIteration) else budget // js.NEWTON_COSTS
        how = optx.ImplicitAdjoint(linear_solver=adjoint(tolerance / scaled))
        return lambda z0, args: optx.fixed_point(f, solver, z0, args, max_steps=steps, throw=False, adjoint=how).value

    forward = {
        "FixedPointIteration": {}, "AndersonAcceleration": {"history_size": 5, "ridge": 1e-12},
        "Broyden": {"history_size": 40, "stepsize": 1.0},
    }  # fmt: skip
    gmres: Any = lambda tolerance: lx.GMRES(rtol=tolerance, atol=1e-7, restart=30, max_steps=BACKWARD // 30)  # noqa: E731
    lu: Any = lambda tolerance: lx.LU()  # noqa: E731
    pairs = {
        "FixedPointIteration, GMRES": (js._picard, gmres, False), "FixedPointIteration, LU": (js._picard, lu, True),
        "Newton(LU), LU": (partial(js._newton, lx.LU()), lu, True),
    }  # fmt: skip
    found = []
    for per_sample in (False, True):
        fits, how = (lambda problem: problem.small, "vmap") if per_sample else (lambda problem: True, "batch")
        for solver, options in forward.items():
            for backward in ("solve_gmres", "solve_bicgstab", "solve_normal_cg"):
                bind = partial(_scaled, partial(of_jaxopt, solver, options, backward), per_sample, js._absolute)
                found.append(Contender(name=f"{solver}, {backward}, {how}", library="jaxopt", bind=bind, fits=fits))
        for name, (make, adjoint, dense) in pairs.items():
            if per_sample or not dense:
                bind = partial(_scaled, partial(of_optimistix, make, adjoint), per_sample, js._per_entry)
                found.append(Contender(name=f"{name}, {how}", library="optimistix", bind=bind, fits=fits))
    return found


def _scaled(made: Callable[..., Any], per_sample: bool, base: Any, problem: Problem, scale: Scale) -> Bound:
    return _in_jax(partial(made, base(scale, per_sample, 1.0)), per_sample, base, problem, scale)
