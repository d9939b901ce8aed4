"""Contenders in JAX: jaxopt and optimistix, each solve compiled whole, the batch as one system or under vmap."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np

from peers.check import Found
from peers.contender import Bound, Contender, Scale
from peers.problems import Problem

jax: Any = importlib.import_module("jax")
jnp: Any = importlib.import_module("jax.numpy")
jaxopt: Any = importlib.import_module("jaxopt")
optx: Any = importlib.import_module("optimistix")
lx: Any = importlib.import_module("lineax")

Solve = Callable[..., tuple[Any, Any]]
"""(f, z0, args, tolerance, budget) -> (z, iterations)."""


def whole(problem: Problem, solve: Solve, per_sample: bool, budget: int) -> Callable[..., tuple[Any, Any]]:
    """(z0, args, tolerance) -> (z, iterations) for a batch."""
    axes = (0, *problem.batch_dims)
    if per_sample:

        def one(z0: Any, args: Any, tolerance: Any) -> tuple[Any, Any]:
            return solve(lambda z, args: problem.jax_map(z, *args), z0, args, tolerance, budget)

        return jax.vmap(one, in_axes=(0, problem.batch_dims, None))
    batched = jax.vmap(problem.jax_map, in_axes=axes)
    return lambda z0, args, tolerance: solve(lambda z, args: batched(z, *args), z0, args, tolerance, budget)


def _bind(
    solve: Solve, per_sample: bool, base: Callable[[Scale, bool, float], float], per_step: float | None,
    problem: Problem, scale: Scale,
) -> Bound:  # fmt: skip
    args = tuple(jnp.asarray(np.array(arg)) for arg in problem.torch_args())
    z0 = jnp.zeros(problem.shape, jnp.float32)

    @cache
    def compiled(budget: int) -> Any:
        return jax.jit(whole(problem, solve, per_sample, budget))

    def run(tolerance: Any, budget: int) -> Any:
        return jax.block_until_ready(compiled(budget)(z0, args, tolerance))

    def found(tolerance: float, budget: int) -> Found:
        z, iterations = run(tolerance, budget)
        steps = int(np.max(np.asarray(iterations)))  # under vmap all samples step until the last one is done
        evaluations = None if per_step is None else round(steps * per_step)
        spent = steps >= (budget if per_step else budget // NEWTON_COSTS)
        return Found(z=np.asarray(z), evaluations=evaluations, exhausted=spent)

    return Bound(
        solve=found, timed=lambda tolerance, budget: partial(run, np.float32(tolerance), budget),
        base=partial(base, scale, per_sample),
    )  # fmt: skip


def _absolute(scale: Scale, per_sample: bool, rtol: float) -> float:
    return rtol * (scale.sample if per_sample else scale.batch)


def _per_entry(scale: Scale, per_sample: bool, rtol: float) -> float:
    return rtol * scale.entry


# jaxopt: absolute tolerances in ‖.‖₂ of all it is given


def _jaxopt_picard(f: Any, z0: Any, args: Any, tolerance: Any, budget: int) -> tuple[Any, Any]:
    solver = jaxopt.FixedPointIteration(f, maxiter=budget, tol=tolerance)
    z, state = solver.run(z0, args)
    return z, state.iter_num


def _jaxopt_anderson(history: int, f: Any, z0: Any, args: Any, tolerance: Any, budget: int) -> tuple[Any, Any]:
    # The ridge is absolute. With its default of 1e-5 every row takes as many iterations or more.
    solver = jaxopt.AndersonAcceleration(f, history_size=history, ridge=1e-12, maxiter=budget, tol=tolerance)
    z, state = solver.run(z0, args)
    return z, state.iter_num


def _jaxopt_broyden(history: int, f: Any, z0: Any, args: Any, tolerance: Any, budget: int) -> tuple[Any, Any]:
    solver = jaxopt.Broyden(
        lambda z, args: z - f(z, args), history_size=history, stepsize=1.0, maxiter=budget, tol=tolerance
    )
    z, state = solver.run(z0, args)
    return z, state.num_fun_eval


JAXOPT: dict[str, Solve] = {
    "FixedPointIteration": _jaxopt_picard,
    **{f"AndersonAcceleration(history_size={m}, ridge=1e-12)": partial(_jaxopt_anderson, m) for m in (3, 10)},
    "Broyden(history_size=10, stepsize=1)": partial(_jaxopt_broyden, 10),
    "Broyden(history_size=40, stepsize=1)": partial(_jaxopt_broyden, 40),
}  # fmt: skip


# optimistix: elementwise tolerances; with rtol = 0 and the root mean square as the norm, those of the residual


NEWTON_COSTS = 8
"""Evaluations that a step of Newton's method is worth at least, where a budget is concerned."""


def _optimistix(make: Callable[[Any], Any], f: Any, z0: Any, args: Any, tolerance: Any, budget: int) -> tuple[Any, Any]:
    solver = make(tolerance)
    steps = budget if isinstance(solver, optx.FixedPointIteration) else budget // NEWTON_COSTS
    found = optx.fixed_point(f, solver, z0, args, max_steps=steps, throw=False)
    return found.value, found.stats["num_steps"]


def _picard(tolerance: Any) -> Any:
    return optx.FixedPointIteration(rtol=0.0, atol=tolerance, norm=optx.rms_norm)


def _newton(linear: Any, tolerance: Any) -> Any:
    return optx.Newton(rtol=0.0, atol=tolerance, norm=optx.rms_norm, linear_solver=linear)


def _chord(linear: Any, tolerance: Any) -> Any:
    return optx.Chord(rtol=0.0, atol=tolerance, norm=optx.rms_norm, linear_solver=linear)


def _dogleg(linear: Any, tolerance: Any) -> Any:
    return optx.Dogleg(rtol=0.0, atol=tolerance, norm=optx.rms_norm, linear_solver=linear)


OPTIMISTIX: dict[str, tuple[Callable[[Any], Any], float | None, bool]] = {
    "FixedPointIteration": (_picard, 1.0, False),
    "Newton(LU)": (partial(_newton, lx.LU()), None, True),
    "Chord(LU)": (partial(_chord, lx.LU()), None, True),
    "Dogleg(LU)": (partial(_dogleg, lx.LU()), None, True),
    "Newton(GMRES(rtol=1e-2))": (partial(_newton, lx.GMRES(rtol=1e-2, atol=1e-7, restart=30, max_steps=2)), None, False),
}
"""name -> (what makes the solver, evaluations per step where that can be told, for small problems alone)."""


def contenders() -> list[Contender]:
    found = []
    for per_sample in (False, True):
        how = "vmap" if per_sample else "batch"
        for name, solve in JAXOPT.items():
            found.append(
                Contender(name=f"{name}, {how}", library="jaxopt", bind=partial(_bind, solve, per_sample, _absolute, 1.0))
            )
        for name, (make, per_step, small) in OPTIMISTIX.items():
            if (small and not per_sample) or (per_sample and "GMRES" in name):
                continue  # the dense Jacobian of a whole batch is block diagonal; vmap runs each Krylov space in lockstep
            found.append(
                Contender(
                    name=f"{name}, {how}", library="optimistix",
                    bind=partial(_bind, partial(_optimistix, make), per_sample, _per_entry, per_step),
                    fits=(lambda problem: problem.small) if small else (lambda problem: True),
                )
            )  # fmt: skip
    return found
