"""How the released training scripts solve, forward and backward."""

from __future__ import annotations

from equilibria.train.config import SolveConfig


def broyden_2019(*, forward: int, backward: int) -> SolveConfig:
    """Broyden's method both ways, with every step kept, to the tolerances of the code of 2019."""
    return SolveConfig(
        method="broyden",
        history=max(forward, backward),
        rtol=0.0,
        atol=1e-6,
        max_evals=forward + 1,
        backward_method="broyden",
        backward_rtol=0.0,
        backward_atol=2e-10,
        backward_max_evals=backward + 1,
    )


def anderson_2021(*, forward: int, backward: int) -> SolveConfig:
    """Anderson's method forward and Broyden's backward, to the relative tolerances of the code of 2021."""
    return SolveConfig(
        method="anderson",
        history=6,
        rtol=1e-3,
        atol=0.0,
        max_evals=forward,
        backward_method="broyden",
        backward_rtol=1e-3,
        backward_max_evals=backward + 1,
    )
