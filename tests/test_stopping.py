"""Stopping: its norms, and what it refuses."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from equilibria import Stopping
from equilibria.stopping import l2, linf, rms, work_dtype


@given(
    rtol=st.floats(allow_nan=True, allow_infinity=True),
    atol=st.floats(allow_nan=True, allow_infinity=True),
    max_evals=st.integers(-3, 10**6),
    check_every=st.integers(-3, 100),
)
def test_accepts_what_is_valid_and_nothing_else(rtol: float, atol: float, max_evals: int, check_every: int) -> None:
    valid = all(math.isfinite(tol) and tol >= 0 for tol in (rtol, atol)) and max_evals >= 1 and check_every >= 1
    options: dict[str, Any] = {"rtol": rtol, "atol": atol, "max_evals": max_evals, "check_every": check_every}
    if valid:
        stopping = Stopping(**options)
        assert {name: getattr(stopping, name) for name in options} == options
        scale = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
        assert torch.equal(stopping.tolerance(scale), atol + rtol * scale)
    else:
        with pytest.raises(ValueError, match=r"must be"):
            Stopping(**options)


@pytest.mark.parametrize(
    ("options", "error", "given", "remedy"),
    [
        ({"rtol": -1e-3}, ValueError, "rtol=-0.001", "finite number >= 0"),
        ({"atol": float("nan")}, ValueError, "atol=nan", "finite number >= 0"),
        ({"rtol": float("inf")}, ValueError, "rtol=inf", "finite number >= 0"),
        ({"max_evals": 0}, ValueError, "max_evals=0", "integer >= 1"),
        ({"max_evals": 2.5}, ValueError, "max_evals=2.5", "integer >= 1"),
        ({"max_evals": None}, ValueError, "max_evals=None", "integer >= 1"),
        ({"check_every": 0}, ValueError, "check_every=0", "integer >= 1"),
        ({"norm": "l2"}, TypeError, "norm='l2'", "equilibria.stopping.rms"),
        ({"tol": 1e-3}, TypeError, "tol", "unexpected keyword"),
    ],
)
def test_says_what_was_given_and_what_is_allowed(options: dict[str, Any], error: type, given: str, remedy: str) -> None:
    with pytest.raises(error) as caught:
        Stopping(**options)
    assert given in str(caught.value)
    assert remedy in str(caught.value)


def test_is_frozen_and_keyword_only() -> None:
    with pytest.raises(TypeError):
        Stopping(1e-3)  # type: ignore[misc]  # pyright: ignore[reportCallIssue]
    with pytest.raises(FrozenInstanceError):
        Stopping().rtol = 1.0  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]
    assert Stopping(rtol=0.5) == Stopping(rtol=0.5) != Stopping(rtol=0.25)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_norms_are_those_of_each_row_in_float32_at_least(dtype: torch.dtype) -> None:
    r = torch.tensor([[3.0, -4.0, 0.0, 0.0], [300.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]], dtype=dtype)
    for norm, expected in ((l2, [5.0, 300.0, 0.0]), (rms, [2.5, 150.0, 0.0]), (linf, [4.0, 300.0, 0.0])):
        values = norm(r)
        assert values.tolist() == expected  # 300² overflows float16: the sum of squares must not be formed in it
        assert values.dtype == work_dtype(dtype) == torch.promote_types(dtype, torch.float32)


def test_a_long_row_loses_nothing_in_low_precision() -> None:
    """4096 ones summed in bfloat16 stop at 256."""
    assert l2(torch.ones(1, 4096, dtype=torch.bfloat16)).tolist() == [64.0]
    assert rms(torch.ones(1, 4096, dtype=torch.bfloat16)).tolist() == [1.0]
