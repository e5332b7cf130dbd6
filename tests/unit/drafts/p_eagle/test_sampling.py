"""Each depth is trained at fewer anchors than the one before, drawn from those, and by seed and sample alone."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from disagg_core.drafts.p_eagle.sampling import Rows, kept_at, sample_rows
from disagg_core.drafts.randomness import generator_of

pytestmark = pytest.mark.unit

masks = st.lists(st.integers(0, 1), min_size=1, max_size=60).map(torch.tensor)
shares = st.floats(0.1, 1.0)


def drawn(mask: Tensor, *, depths: int = 8, retention: float = 0.8, least: float = 0.2, name: str = "s/0") -> Rows:
    return sample_rows(mask, depths, retention, least, generator_of(3, name, "rows"))


def by_depth(rows: Rows) -> list[list[int]]:
    return [rows.anchors[rows.depths == depth].tolist() for depth in range(int(rows.depths.max()) + 1)]


@given(mask=masks, retention=shares, least=shares)
@settings(max_examples=200, deadline=None)
def test_an_anchor_is_there_at_every_depth_before(mask: Tensor, retention: float, least: float) -> None:
    levels = by_depth(drawn(mask, retention=retention, least=least))

    assert levels[0] == list(range(len(mask)))
    for before, after in pairwise(levels):
        assert set(after) <= set(before)
        assert after == sorted(set(after))


@given(mask=masks, retention=shares, least=shares)
@settings(max_examples=200, deadline=None)
def test_a_depth_keeps_the_share_that_the_formula_says_or_all_it_can(
    mask: Tensor, retention: float, least: float
) -> None:
    levels = by_depth(drawn(mask, retention=retention, least=least))
    valid = int(mask.sum())

    pool = {int(place) for place in mask.nonzero()}
    for depth in range(1, 8):
        pool = {place for place in pool if place >= depth}
        count = kept_at(depth, valid, retention, least)
        assert count == int(max(0, valid - depth) * max(retention**depth, least))
        if count == 0:
            assert len(levels) <= depth
            return
        found = levels[depth] if depth < len(levels) else []
        assert len(found) == min(count, len(pool))
        assert {anchor + depth for anchor in found} <= pool
        pool = {
            place + 1 for place in (anchor + depth for anchor in found) if place + 1 < len(mask) and mask[place + 1]
        }


@given(mask=masks)
@settings(max_examples=100, deadline=None)
def test_a_row_never_leaves_its_sequence_and_is_trained_beyond_depth_0(mask: Tensor) -> None:
    rows = drawn(mask)
    positions = rows.anchors + rows.depths

    assert int(rows.anchors.min()) >= 0
    assert int(positions.max()) < len(mask)
    assert bool(mask[positions[rows.depths > 0]].all())


def test_a_fully_trained_sequence_has_the_published_counts() -> None:
    counts = [len(level) for level in by_depth(drawn(torch.ones(100)))]

    assert counts == [100, 79, 62, 49, 39, 31, 24, 19]


def test_no_position_to_train_leaves_depth_0() -> None:
    assert by_depth(drawn(torch.zeros(5))) == [[0, 1, 2, 3, 4]]


def test_a_hole_in_the_mask_ends_the_chains_that_reach_it() -> None:
    mask = torch.ones(12)
    mask[6] = 0

    levels = by_depth(drawn(mask, depths=4, retention=1.0))

    assert set(levels[1]) == {place - 1 for place in range(1, 12) if place != 6}
    assert not {3, 4, 5} & set(levels[3])


def test_a_draw_is_a_function_of_seed_and_sample() -> None:
    mask = torch.ones(80)

    first, again, other = drawn(mask), drawn(mask), drawn(mask, name="s/1")
    reseeded = sample_rows(mask, 8, 0.8, 0.2, generator_of(4, "s/0", "rows"))

    assert torch.equal(first.anchors, again.anchors)
    assert not torch.equal(first.anchors, other.anchors)
    assert not torch.equal(first.anchors, reseeded.anchors)
