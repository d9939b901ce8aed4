"""The model of a run: one class for each family, with the options of that family alone."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass

from equilibria.models.deq_transformer import TransformerShape
from equilibria.models.deq_trellisnet import TrellisShape
from equilibria.solution import UserError
from equilibria.train.checks import check


@dataclass(frozen=True, kw_only=True)
class TransformerModel(TransformerShape):
    """Shape of the Transformer; its vocabulary comes from the corpus."""

    def __post_init__(self) -> None:
        _as_options(self, super().__post_init__)
        fits = self.d_model % self.n_head == 0 and self.d_model % 2 == 0
        check(fits, "d_model", self.d_model, f"give an even multiple of --n-head {self.n_head}")
        _check_dropouts(self)


@dataclass(frozen=True, kw_only=True)
class TrellisModel(TrellisShape):
    """Shape of the TrellisNet; its vocabulary comes from the corpus."""

    def __post_init__(self) -> None:
        _as_options(self, super().__post_init__)
        _check_dropouts(self)


Model = TransformerModel | TrellisModel
FAMILIES: dict[str, type[TransformerModel] | type[TrellisModel]] = {
    "transformer": TransformerModel,
    "trellisnet": TrellisModel,
}
"""Name of a family, as it stands in config.json -> the class of its options."""


def family(model: Model) -> str:
    """The name of the family that the options belong to."""
    return next(name for name, kind in FAMILIES.items() if isinstance(model, kind))


def fixed_fields(model: Model) -> list[str]:
    """The fields that a resumed run may not change: all but those that neither the tensors nor their meaning depend on."""
    names = (item.name for item in dataclasses.fields(model))
    return [name for name in names if not name.endswith("dropout") and name != "eval_mem_len"]


def _as_options(model: Model, check_shape: Callable[[], None]) -> None:
    """Let a shape check itself; where it objects, name its fields as they are typed."""
    try:
        check_shape()
    except ValueError as error:
        names = "|".join(item.name for item in dataclasses.fields(model))
        message = re.sub(rf"\b({names})\b", lambda name: f"--{name[0].replace('_', '-')}", str(error))
        raise UserError(message) from None


def _check_dropouts(model: object) -> None:
    assert dataclasses.is_dataclass(model)
    for item in dataclasses.fields(model):
        if item.name.endswith("dropout"):
            share = getattr(model, item.name)
            check(0 <= share < 1, item.name, share, "give a share from 0 up to, not including, 1")
