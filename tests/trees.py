"""Random nested structures, for properties that must hold whatever the structure of a state."""

from __future__ import annotations

from typing import Any, NamedTuple

from hypothesis import strategies as st


class Pair(NamedTuple):
    a: Any
    b: Any


def trees(leaves: st.SearchStrategy[Any], *, most: int) -> st.SearchStrategy[Any]:
    """Lists, tuples, dicts and named tuples inside one another, with up to about `most` leaves."""
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.lists(inner, min_size=1, max_size=3),
            st.lists(inner, min_size=1, max_size=3).map(tuple),
            st.dictionaries(st.text(max_size=3), inner, min_size=1, max_size=3),
            st.builds(Pair, inner, inner),
        ),
        max_leaves=most,
    )
