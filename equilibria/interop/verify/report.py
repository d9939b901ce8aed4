"""What was compared, how far it was off, and whether that is close enough."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Check:
    """One quantity of one case in one precision; where it was compared several times, the worst."""

    case: str
    quantity: str
    dtype: str
    error: float
    tolerance: float
    note: str = ""
    """Where the error is largest, or what is wrong."""

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance  # NaN does not pass

    def line(self) -> str:
        sign, verdict = ("<=", "pass") if self.passed else ("> ", "FAIL")
        words = f"{self.case}  {self.quantity}  ({self.dtype})"
        return f"{words:<80} {self.error:9.1e} {sign} {self.tolerance:7.1e}  {verdict}  {self.note}".rstrip()

    def record(self) -> dict[str, Any]:
        """For JSON, which knows no infinity."""
        fields = asdict(self) | {"passed": self.passed}
        return {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in fields.items()}


@dataclass
class Report:
    """The checks of one case in one precision."""

    case: str
    dtype: str
    checks: dict[str, Check] = field(default_factory=dict)

    def add(self, quantity: str, error: float, tolerance: float, note: str = "") -> None:
        """Keep the worst of a quantity."""
        new = Check(self.case, quantity, self.dtype, error, tolerance, note)
        old = self.checks.get(quantity)
        if old is None or (old.passed and not new.passed) or (old.passed == new.passed and new.error > old.error):
            self.checks[quantity] = new

    def relative(self, quantity: str, ours: Tensor, theirs: Tensor, tolerance: float, note: str = "") -> None:
        """‖ours - theirs‖₂ / ‖theirs‖₂; ‖ours‖₂ where theirs is zero."""
        if self._fits(quantity, ours, theirs, tolerance):
            self.add(quantity, relative(ours, theirs), tolerance, note)

    def largest(self, quantity: str, ours: Tensor, theirs: Tensor, tolerance: float, note: str = "") -> None:
        """max |ours - theirs|."""
        if self._fits(quantity, ours, theirs, tolerance):
            difference = ours.detach().double() - theirs.detach().double()
            self.add(quantity, float(difference.abs().max()) if ours.numel() else 0.0, tolerance, note)

    def exact(self, quantity: str, same: bool, note: str = "") -> None:
        """Error 0 or 1."""
        self.add(quantity, 0.0 if same else 1.0, 0.0, "" if same else note)

    def trace(
        self, quantity: str, ours: list[float], theirs: Iterable[Any], tolerance: float, *, first: int | None = None
    ) -> None:
        """The relative error of each entry that is at least 10⁻⁶ of the first entry; `first`: of so many entries alone."""
        recorded = [float(entry) for entry in theirs][:first]
        pairs = list(zip(ours, recorded, strict=False))
        errors = [abs(o - t) / t for o, t in pairs if t > 0 and math.isfinite(t) and t >= 1e-6 * recorded[0]]
        errors += [0.0 if math.isinf(o) else math.inf for o, t in pairs if math.isinf(t)]
        self.add(quantity, max(errors, default=0.0), tolerance)

    def _fits(self, quantity: str, ours: Tensor, theirs: Tensor, tolerance: float) -> bool:
        if ours.shape == theirs.shape:
            return True
        note = f"shape {tuple(ours.shape)}, recorded {tuple(theirs.shape)}"
        self.add(quantity, math.inf, tolerance, note)
        return False


def relative(ours: Tensor, theirs: Tensor) -> float:
    """‖ours - theirs‖₂ / ‖theirs‖₂, in double; ‖ours‖₂ where theirs is zero.

    >>> relative(torch.ones(4), 2 * torch.ones(4))
    0.5
    """
    ours, theirs = ours.detach().double(), theirs.detach().double()
    size = float(torch.linalg.vector_norm(theirs))
    return float(torch.linalg.vector_norm(ours - theirs)) / (size or 1.0)


def summary(checks: list[Check], seconds: float) -> str:
    """The last line: how many of how many passed."""
    failed = [check for check in checks if not check.passed]
    cases = {check.case for check in checks}
    bad = {check.case for check in failed}
    return (
        f"{len(cases) - len(bad)} of {len(cases)} cases pass, {len(checks) - len(failed)} of {len(checks)} quantities, "
        f"{seconds:.0f} s"
    )
