"""Run cases one after the other; whatever goes wrong in one is a failed check of it."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterator
from pathlib import Path

import torch

from equilibria.interop.verify.cases import Case, find_cases
from equilibria.interop.verify.kinds import demanded, kind_of
from equilibria.interop.verify.report import Check, Report
from equilibria.solution import UserError

DTYPES = {"float64": torch.float64, "float32": torch.float32}


def verify(folder: Path, *, only: str | None = None, dtypes: tuple[str, ...] = ("float64", "float32")) -> Iterator[Check]:
    """Check every recorded case under a folder; each check comes as soon as its case is done.

    Args:
        folder: of cases and their MANIFEST.json, or of a single case.
        only: a pattern for the names of cases, as of files: `trellis_*`. A part of a name will do.
        dtypes: precisions in which to check, of those that a case demands.

    Raises:
        UserError: no case to check.
    """
    cases = [case for case in find_cases(folder) if only is None or _matches(case.name, only)]
    if not cases:
        raise UserError(f"no case in {folder} matches {only!r}")
    found = False
    for case in cases:
        for check in verify_case(case, dtypes):
            found = True
            yield check
    if not found:
        raise UserError(f"no case demands {' or '.join(dtypes)}; leave out --dtype")


def verify_case(case: Case, dtypes: tuple[str, ...] = ("float64", "float32")) -> list[Check]:
    """All checks of one case. None if it is sound but demands other precisions."""
    sound = Report(case.name, "file")
    for fault in case.faults():
        sound.add(fault, math.inf, 0.0)
    kind = None if sound.checks else kind_of(case)
    if kind is None:
        if not sound.checks:
            sound.add("kind", math.inf, 0.0, "no case of this kind is known: its name begins like none of them")
        return list(sound.checks.values())
    checks: list[Check] = []
    wanted = demanded(case, kind)
    if not wanted:
        sound.add("tolerances", math.inf, 0.0, "the manifest names none that this kind of case has")
        return list(sound.checks.values())
    for dtype, group in wanted.items():
        name = str(dtype).removeprefix("torch.")
        if name in dtypes:
            report = Report(case.name, name)
            try:
                kind.check(case, dtype, case.tolerances[group], report)
            except Exception as error:  # a case that cannot be run must not keep the others from running
                report.add("error", math.inf, 0.0, f"{type(error).__name__}: {error}".splitlines()[0])
            if not report.checks:
                report.add("error", math.inf, 0.0, "nothing was compared")
            checks += report.checks.values()
    unseen = case.unseen()
    if unseen and all(str(dtype).removeprefix("torch.") in dtypes for dtype in wanted):
        checks.append(Check(case.name, "recorded, but not compared", "file", len(unseen), math.inf, ", ".join(unseen)))
    return checks


def _matches(name: str, pattern: str) -> bool:
    return pattern in name or fnmatch.fnmatch(name, pattern)
