"""The seeded order, the reorder buffer, and batches: what decides which prompt comes when."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disagg_core.contracts import PromptTask, SampleRef, sample_id_of
from disagg_core.engines.transformers import token_batches
from disagg_core.prompts.order import SeededPermutation
from disagg_core.rollout.pipeline import largest_group
from disagg_core.rollout.reorder import ReorderBuffer
from disagg_core.run.watermarks import Watermarks

pytestmark = pytest.mark.unit


@given(size=st.integers(0, 700), seed=st.integers(0, 2**64 - 1))
@settings(deadline=None)
def test_the_order_is_a_permutation(size, seed):
    order = SeededPermutation(size, seed)
    assert sorted(order[position] for position in range(size)) == list(range(size))


def test_the_order_depends_on_the_seed_and_shuffles_well():
    one, two = SeededPermutation(10_000, 1), SeededPermutation(10_000, 2)
    first = [one[i] for i in range(1000)]
    assert first != [two[i] for i in range(1000)]
    assert first == [SeededPermutation(10_000, 1)[i] for i in range(1000)]
    assert 4500 < sum(first) / 1000 < 5500
    assert sum(abs(a - b) == 1 for a, b in itertools.pairwise(first)) < 10


def test_a_huge_order_needs_no_time_and_no_memory():
    order = SeededPermutation(10**12, 7)
    assert len({order[i] for i in range(1000)}) == 1000


def ref_of(ordinal: int) -> SampleRef:
    return SampleRef(
        sample_id=sample_id_of(ordinal), run_id="r", attempt=1, source_task_id="", feature_store_uri="", key="",
        size_bytes=1, crc32=None, feature_specs={}, strategy="eagle3", schema_version=1, target_model_version="",
        draft_weight_version=0, tokenizer_version="", vocab_map_version="", num_tokens=1,
    )  # fmt: skip


@given(st.data())
def test_references_leave_in_prompt_order_whatever_comes_first(data):
    size = data.draw(st.integers(1, 12))
    dropped = data.draw(st.sets(st.integers(0, size - 1)))
    buffer, left = ReorderBuffer(ordered=True), []
    for ordinal in range(size):
        buffer.expect(ordinal)
    for ordinal in data.draw(st.permutations(range(size))):
        if ordinal in dropped:
            buffer.drop(ordinal)
        else:
            buffer.put(ordinal, ref_of(ordinal))
        had_ready = buffer.has_ready
        ready = buffer.pop_ready(data.draw(st.integers(1, 3)))
        assert had_ready == bool(ready)
        left += ready
    left += buffer.pop_ready(size)
    assert [ref.sample_id for ref in left] == [sample_id_of(n) for n in range(size) if n not in dropped]
    assert len(buffer) == 0


def test_unordered_references_leave_as_they_come_and_the_rest_can_be_drained():
    buffer = ReorderBuffer(ordered=False)
    for ordinal in range(3):
        buffer.expect(ordinal)
    buffer.put(2, ref_of(2))
    assert [ref.sample_id for ref in buffer.pop_ready(9)] == [sample_id_of(2)]
    buffer.put(1, ref_of(1))
    assert [ref.sample_id for ref in buffer.drain()] == [sample_id_of(1)]


@given(lengths=st.lists(st.integers(1, 40), max_size=30), budget=st.integers(20, 200), room=st.sampled_from([0, 8]))
def test_batches_hold_every_task_once_within_the_budget(lengths, budget, room):
    tasks = [
        PromptTask(ordinal=n, source="", input_ids=[1] * size, loss_mask=[1] * size) for n, size in enumerate(lengths)
    ]
    batches = token_batches(tasks, budget, room=room)
    assert sorted(task.ordinal for batch in batches for task in batch) == list(range(len(tasks)))
    for batch in batches:
        padded = (max(len(task.input_ids) for task in batch) + room) * len(batch)
        assert len(batch) == 1 or padded <= budget
    assert batches == token_batches(tasks[::-1], budget, room=room), "the given order changes nothing"


@given(
    window=st.integers(1, 50), extra=st.integers(0, 100), wanted=st.integers(1, 64), sample=st.integers(1, 9),
    extra_bytes=st.integers(0, 500),
)  # fmt: skip
def test_a_group_always_fits_once_the_consumer_has_taken_whole_windows(window, extra, wanted, sample, extra_bytes):
    marks = Watermarks(
        window=window, high_refs=window + extra, high_bytes=window * sample + extra_bytes, max_sample_bytes=sample
    )
    group = largest_group(marks, wanted)
    stuck = window - 1
    assert 1 <= group <= wanted
    assert stuck + group <= marks.high_refs
    assert (stuck + group) * sample <= marks.high_bytes
