"""How close is close enough: the limits that a manifest demands."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from equilibria.solution import UserError

Limits = Mapping[str, tuple[float, ...]]
"""Of one group, by what they limit: the numbers of its sentence in the manifest, in order."""

DEFAULTS: dict[str, dict[str, tuple[float, ...]]] = {
    "model_float64": {
        "how": (1e-12,),  # relative residual of every solve
        "nll": (1e-8,),
        "loss": (1e-9,),
        "zstar": (1e-9,),
        "mem_*": (1e-9,),
        "grad.*": (1e-7, 1e-8),  # of each parameter, of all together
        "stacked_*/pretrain (no solver)": (1e-10, 1e-10),  # losses, gradients
    },
    "model_float32": {
        "how": (),  # to the floor
        "nll": (5e-4,),
        "loss": (5e-5,),
        "zstar": (1e-4,),
        "mem_*": (1e-4,),
        "grad.*": (1e-3, 2e-4),
        "stacked_*/pretrain (no solver)": (2e-4, 2e-4),
    },
    "model_broyden_trace": {"trace": (1e-3, 1e-7), "lowest_step": (1.0,)},  # all entries, the first ten
    "component_float64": {"all tensors": (1e-11,)},
    "component_float32": {"all tensors": (2e-5,)},
    "component_broyden": {"trace": (1e-7,), "nstep": (1.0,), "result": (1e-9, 1e-6)},  # converged, not converged
    "component_radam": {"float64": (1e-12,), "float32": (1e-5,)},
    "component_vocabulary_batching": {},  # exact
    "component_lr_schedule": {"lr_at_step": (1e-12,)},
    "deq2021_solvers_jacobian": {"anderson traces": (1e-6,), "jac": (1e-11,), "power": (1e-9,)},
    "checkpoint": {"nll": (1e-8, 5e-4)},  # float64, float32
}
"""Used where there is no manifest, or where it says nothing."""

_NUMBER = re.compile(r"(?:<=|within)\s*([0-9.]+(?:e[+-]?\d+)?)")


def read_tolerances(manifest: Mapping[str, Any]) -> dict[str, Limits]:
    """The limits of each group, out of the sentences of a manifest.

    A sentence such as "max abs <= 1e-8" gives the numbers behind "<=" or "within"; what stands in parentheses is a remark.

    Raises:
        UserError: a sentence has more or fewer numbers than are needed.

    >>> read_tolerances({"model_float64": {"nll": "max abs <= 1e-6"}})["model_float64"]["nll"]
    (1e-06,)
    """
    tolerances: dict[str, Limits] = {}
    for group, defaults in DEFAULTS.items():
        limits = dict(defaults)
        sentences = manifest.get(group, {})
        for key in defaults.keys() & sentences.keys():
            limits[key] = _numbers(str(sentences[key]))
            if len(limits[key]) != len(defaults[key]):
                raise UserError(
                    f"tolerance {group}: {key}: {sentences[key]!r} holds {len(limits[key])} limits where "
                    f"{len(defaults[key])} are needed; write each as `<= 1e-8`"
                )
        tolerances[group] = limits
    return tolerances


def _numbers(sentence: str) -> tuple[float, ...]:
    return tuple(float(number) for number in _NUMBER.findall(re.sub(r"\([^)]*\)", "", sentence)))
