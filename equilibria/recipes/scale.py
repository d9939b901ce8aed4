"""A recipe at another size."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from equilibria.solution import UserError
from equilibria.train.config import OptimConfig, RunConfig, TransformerModel


def scaled(config: RunConfig, scale: float) -> RunConfig:
    """The run with its widths, its batch and all its numbers of steps multiplied by `scale`.

    Widths are rounded to what their model can have: `d_model` to an even multiple of the heads, and `div_val` is lowered
    where it would leave no width to the rarest words. Lengths, clusters, dropouts, rates, tolerances and the corpus stay
    as they are. So any recipe can be tried on a laptop. A schedule that cuts the rate at epochs becomes a cosine down
    to the same end, since steps and batches of another number make other epochs.

    >>> from equilibria.recipes.laptop import quickstart
    >>> scaled(quickstart(), 0.5).model.d_model
    48
    """
    if not 0 < scale < math.inf:
        raise UserError(f"--scale is {scale}; give a number above zero")
    if scale == 1:
        return config

    def times(value: Any, multiple: int = 1) -> Any:
        return None if value is None else max(1, round(value * scale / multiple)) * multiple

    model, optim = config.model, config.optim
    if isinstance(model, TransformerModel):
        model = dataclasses.replace(
            model,
            d_model=times(model.d_model, math.lcm(2, model.n_head)),
            d_inner=times(model.d_inner),
            d_embed=times(model.d_embed),
        )
        model = dataclasses.replace(model, div_val=_fitting(model))
    else:
        model = dataclasses.replace(
            model, d_embed=times(model.d_embed), d_hidden=times(model.d_hidden), d_output=times(model.d_output)
        )
    batch_size = times(optim.batch_size)
    steps = times(optim.steps)
    return dataclasses.replace(
        config,
        model=model,
        optim=dataclasses.replace(
            optim,
            steps=steps,
            warmup_steps=round(optim.warmup_steps * scale),
            pretrain_steps=round(optim.pretrain_steps * scale),
            batch_size=batch_size,
            batch_chunk=min(optim.batch_chunk, batch_size),
            **_schedule(optim),
        ),
        solver=dataclasses.replace(config.solver, jacobian_every=times(config.solver.jacobian_every)),
        eval_every=times(config.eval_every),
        log_every=min(config.log_every, max(1, steps // 10)),
    )


def _schedule(optim: OptimConfig) -> dict[str, Any]:
    return {"schedule": "cosine", "decay_epochs": (), "anneal": None} if optim.schedule == "step-decay" else {}


def _fitting(model: TransformerModel) -> int:
    """The largest div_val, up to the model's, that leaves each cluster a width of 1."""
    width, clusters = model.d_embed or model.d_model, len(model.cutoffs)
    return next(div for div in range(model.div_val, 0, -1) if width // div**clusters >= 1)
