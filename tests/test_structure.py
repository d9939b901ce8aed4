"""Nested states and the flat matrix that solvers see; what cannot be a state, and what f must not return."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._pytree import tree_flatten
from trees import trees

from equilibria import Broyden, Picard, Stopping, fixed_point
from equilibria.structure import layout_of


@st.composite
def states(draw: st.DrawFn) -> Any:
    """A random nested structure of tensors with one batch and dtype, no two values alike."""
    batch = draw(st.integers(1, 4))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    count = 0

    def leaf(shape: list[int]) -> torch.Tensor:
        nonlocal count
        size = batch * torch.Size(shape).numel()
        count += size
        return torch.arange(count - size, count, dtype=dtype).reshape(batch, *shape)

    leaves = st.lists(st.integers(1, 3), max_size=3).map(leaf)
    return draw(trees(leaves, most=6))


def noncontiguous(state: Any) -> Any:
    from torch.utils._pytree import tree_map

    return tree_map(lambda leaf: leaf.repeat_interleave(2, dim=0)[::2], state)


class TestLayout:
    @given(state=states())
    def test_unpack_is_the_inverse_of_pack(self, state: Any) -> None:
        layout = layout_of(state)
        leaves, spec = tree_flatten(state)
        flat = layout.pack(noncontiguous(state))
        assert flat.shape == (len(leaves[0]), sum(leaf[0].numel() for leaf in leaves))
        assert flat.dtype == leaves[0].dtype
        back, back_spec = tree_flatten(layout.unpack(flat))
        assert back_spec == spec
        assert all(torch.equal(a, b) and a.shape == b.shape for a, b in zip(back, leaves, strict=True))

    @given(state=states())
    def test_a_row_holds_a_sample(self, state: Any) -> None:
        """Rows of the matrix are samples, so that some of them can be solved alone."""
        layout = layout_of(state)
        flat = layout.pack(state)
        last = tree_flatten(layout.unpack(flat[-1:]))[0]
        assert all(torch.equal(a, b[-1:]) for a, b in zip(last, tree_flatten(state)[0], strict=True))
        numbers = {value for leaf in tree_flatten(state)[0] for value in leaf[-1].flatten().tolist()}
        assert set(flat[-1].tolist()) == numbers

    @settings(max_examples=30)
    @given(state=states())
    def test_any_structure_can_be_solved(self, state: Any) -> None:
        """z = 0.5 z + c has the fixed point 2 c, whatever the structure."""
        from torch.utils._pytree import tree_map

        seen = []

        def f(z: Any, c: Any) -> Any:
            seen.append(type(z))
            return tree_map(lambda z, c: 0.5 * z + c, z, c)

        z0 = tree_map(torch.zeros_like, state)
        z, stats = fixed_point(f, z0, state, stopping=Stopping(rtol=1e-5, max_evals=100))
        assert stats.converged.all()
        assert set(seen) == {type(z)} == {type(state)}
        for mine, c in zip(tree_flatten(z)[0], tree_flatten(state)[0], strict=True):
            assert torch.allclose(mine, 2 * c, rtol=1e-3, atol=1e-2)


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(*shape, dtype=dtype)


@pytest.mark.parametrize(
    ("z0", "error", "words"),
    [
        (ones(2, 3).long(), TypeError, ["z is torch.int64", "z0.float()"]),
        (ones(2, 3).bool(), TypeError, ["z is torch.bool", "z0.float()"]),
        (ones(2, 3).to(torch.complex64), TypeError, ["z is torch.complex64", "real floating-point"]),
        (torch.tensor(1.0), ValueError, ["z has no dimension", "z0.unsqueeze(0)"]),
        (ones(0, 3), ValueError, ["shape (0, 3)", "nothing to solve", "empty batch"]),
        (ones(3, 0), ValueError, ["shape (3, 0)", "nothing to solve"]),
        ((), ValueError, ["z0 holds no tensor", "give a tensor"]),
        ({}, ValueError, ["z0 holds no tensor", "give a tensor"]),
        (None, TypeError, ["z0 holds a NoneType at z", "tensors alone"]),
        (1.5, TypeError, ["z0 holds a float at z", "tensors alone"]),
        ([ones(2, 3), "x"], TypeError, ["z0 holds a str at z[1]", "tensors alone"]),
        ({"h": ones(2, 3), "c": ones(4, 3)}, ValueError, ["z['c'] has batch size 4", "z['h'] has 2", "must agree"]),
        (
            (ones(2, 3), ones(2, 3, dtype=torch.float64)),
            ValueError,
            ["z[1] has dtype torch.float64", "z[0] has torch.float32"],
        ),
        ((ones(2, 3), ones(2, 3).to("meta")), ValueError, ["z[1] has device meta", "z[0] has cpu"]),
    ],
    ids=lambda value: None,
)
def test_refuses_what_is_no_state(z0: Any, error: type, words: list[str]) -> None:
    calls = []
    with pytest.raises(error) as caught:
        fixed_point(lambda z: calls.append(0) or z, z0)
    for word in words:
        assert word in str(caught.value)
    assert not calls


BAD_OUTPUTS = {
    "shape": (lambda z: z[:, :2], ValueError, ["f returned shape (2, 2)", "z of shape (2, 3)", "same shape"]),
    "batch": (lambda z: z[:1], ValueError, ["f returned shape (1, 3)", "z of shape (2, 3)"]),
    "broadcastable": (lambda z: z[:, :1], ValueError, ["f returned shape (2, 1)"]),
    "transposed": (lambda z: z.T, ValueError, ["f returned shape (3, 2)"]),
    "dtype": (lambda z: z.double(), ValueError, ["f returned torch.float64", "z of torch.float32", "cast inside f"]),
    "structure": (
        lambda z: (z, z),
        ValueError,
        ["f returned the structure (tensor, tensor)", "return the structure of z0"],
    ),
    "dict": (lambda z: {"h": z}, ValueError, ["f returned the structure {'h': tensor}", "return the structure of z0"]),
    "nothing": (lambda z: None, TypeError, ["f returned a NoneType for z", "return a tensor"]),
    "number": (lambda z: 1.0, TypeError, ["f returned a float for z", "return a tensor"]),
}


@pytest.mark.parametrize("kind", BAD_OUTPUTS)
@pytest.mark.parametrize("solver", [Picard(), Broyden(line_search=2)], ids=["picard", "broyden"])
@pytest.mark.parametrize("at", [1, 3], ids=["at once", "at a later evaluation"])
@pytest.mark.parametrize("grad", [True, False])
def test_refuses_what_f_must_not_return(kind: str, solver: Any, at: int, grad: bool) -> None:
    spoil, error, words = BAD_OUTPUTS[kind]
    calls = 0

    def f(z: torch.Tensor) -> Any:
        nonlocal calls
        calls += 1
        return spoil(torch.cos(z)) if calls == at else torch.cos(z)

    with torch.set_grad_enabled(grad), pytest.raises(error) as caught:
        fixed_point(f, torch.ones(2, 3), solver=solver, stopping=Stopping(rtol=1e-6))
    for word in words:
        assert word in str(caught.value)
    assert calls == at


def test_names_the_part_of_a_nested_state() -> None:
    z0 = {"h": ones(2, 3), "c": [ones(2, 4), ones(2)]}
    with pytest.raises(ValueError, match=re.escape("f returned shape (2, 4) for z['c'][1] of shape (2,)")):
        fixed_point(lambda z: {"h": z["h"], "c": [z["c"][0], z["c"][0]]}, z0)
    with pytest.raises(
        ValueError, match=r"f returned the structure \{'h': tensor\} for a state with the tensors z\['h'\], z\['c'\]"
    ):
        fixed_point(lambda z: {"h": z["h"]}, z0)
    with pytest.raises(TypeError, match=re.escape("f returned a int for z['c'][0]; return a tensor")):
        fixed_point(lambda z: {"h": z["h"], "c": [1, z["c"][1]]}, z0)
