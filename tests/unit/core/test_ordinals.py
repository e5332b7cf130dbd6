"""The data cursor behaves like a set, however its ranges grow together."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg_core.ordinals import OrdinalSet

pytestmark = pytest.mark.unit


@given(st.lists(st.integers(0, 60)))
def test_it_is_a_set(ordinals: list[int]) -> None:
    mine, model = OrdinalSet(), set()
    for ordinal in ordinals:
        assert mine.add(ordinal) == (ordinal not in model)
        model.add(ordinal)
    assert len(mine) == len(model)
    assert list(mine) == sorted(model)
    assert all((ordinal in mine) == (ordinal in model) for ordinal in range(62))
    assert OrdinalSet(mine.ranges()) == mine


@given(st.sets(st.integers(0, 60)))
def test_its_ranges_are_as_few_as_can_be(ordinals: set[int]) -> None:
    ranges = OrdinalSet((o, o) for o in ordinals).ranges()
    assert all(following[0] > previous[1] + 1 for previous, following in itertools.pairwise(ranges))


@pytest.mark.parametrize("bad", [[(3, 1)], [(-1, 2)], [("a", 2)]])
def test_rubbish_is_refused(bad: list) -> None:
    with pytest.raises(ValueError, match="ranges of ordinals"):
        OrdinalSet(bad)
