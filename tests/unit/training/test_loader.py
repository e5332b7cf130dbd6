"""How a window is shared out and padded."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg_core.contracts import SCHEMA_VERSION, SampleRef
from disagg_core.training.progress import TrainingProgress
from disagg_core.training.window import Cut, balanced_share_of, packed_share_of, share_of

pytestmark = pytest.mark.unit


def ref(ordinal: int, num_tokens: int) -> SampleRef:
    return SampleRef(
        sample_id=f"s{ordinal:09d}",
        run_id="r",
        attempt=1,
        source_task_id="t",
        feature_store_uri="mooncake://",
        key=f"k{ordinal}",
        size_bytes=1,
        crc32=None,
        feature_specs={},
        strategy="eagle3",
        schema_version=SCHEMA_VERSION,
        target_model_version="",
        draft_weight_version=0,
        tokenizer_version="",
        vocab_map_version="",
        num_tokens=num_tokens,
    )


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=40),
    size=st.integers(1, 4),
    batch_size=st.integers(1, 5),
    by_length=st.booleans(),
)
def test_every_sample_is_trained_by_exactly_one_rank_and_all_ranks_keep_step(lengths, size, batch_size, by_length):
    refs = [ref(i, tokens) for i, tokens in enumerate(lengths)]

    shares = [share_of(refs, rank, size, batch_size, by_length=by_length) for rank in range(size)]

    assert sorted(index for share in shares for batch in share for index in batch) == list(range(len(refs)))
    assert len({len(share) for share in shares}) == 1
    sizes = [len(batch) for share in shares for batch in share]
    assert max(sizes) <= batch_size
    assert max(sizes) - min(sizes) <= 1


def test_a_full_window_fills_every_micro_batch():
    refs = [ref(i, 5) for i in range(12)]

    assert share_of(refs, 1, 2, 3, by_length=False) == [[3, 4, 5], [9, 10, 11]]


def test_samples_of_like_length_share_a_micro_batch_longest_first():
    refs = [ref(i, tokens) for i, tokens in enumerate([3, 9, 4, 8])]

    assert share_of(refs, 0, 1, 2, by_length=True) == [[1, 3], [2, 0]]


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=40),
    size=st.integers(1, 4),
    tokens=st.integers(1, 120),
)
def test_packed_rows_hold_the_samples_of_the_window_and_no_more_tokens_than_allowed(lengths, size, tokens):
    refs = [ref(i, length) for i, length in enumerate(lengths)]

    shares = [packed_share_of(refs, rank, size, tokens) for rank in range(size)]

    assert sorted(index for share in shares for row in share for index in row) == list(range(len(refs)))
    assert len({len(share) for share in shares}) == 1
    assert all(sum(lengths[i] for i in row) <= tokens or len(row) == 1 for share in shares for row in share)
    loads = [sum(lengths[i] for row in share for i in row) for share in shares]
    assert max(loads) - min(loads) <= max(lengths)


def test_packed_rows_are_filled_from_the_longest_sample_on():
    refs = [ref(i, tokens) for i, tokens in enumerate([30, 100, 60, 40, 10])]

    assert packed_share_of(refs, 0, 1, 100) == [[1], [2, 3], [0, 4]]


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=40),
    size=st.integers(1, 4),
    batch_size=st.integers(1, 5),
)
def test_packed_micro_batches_are_made_of_the_samples_of_the_window_and_keep_to_batch_size(lengths, size, batch_size):
    refs = [ref(i, tokens) for i, tokens in enumerate(lengths)]

    shares = [balanced_share_of(refs, rank, size, batch_size) for rank in range(size)]

    assert sorted(index for share in shares for batch in share for index in batch) == list(range(len(refs)))
    assert {len(share) for share in shares} == {-(-len(refs) // (size * batch_size))}
    assert max(len(batch) for share in shares for batch in share) <= batch_size


def spread_of(shares: list[list[list[int]]], lengths: list[int]) -> tuple[int, int]:
    """Return by how many tokens ranks differ, and by how many micro-batches do."""
    micro_batches = [[sum(lengths[i] for i in batch) for batch in share] for share in shares]
    ranks, rows = [sum(sums) for sums in micro_batches], [tokens for sums in micro_batches for tokens in sums]
    return max(ranks) - min(ranks), max(rows) - min(rows)


def test_ranks_and_packed_micro_batches_differ_less_in_tokens_than_those_of_samples_of_like_length():
    """Lengths are log-normal, as those of chats are, about 500 tokens on average; a step trains the same samples."""
    drawn = random.Random(7)
    before, after = [], []
    for _ in range(50):
        lengths = [min(2048, max(32, round(drawn.lognormvariate(5.9, 0.8)))) for _ in range(4 * 4 * 2)]
        refs = [ref(i, tokens) for i, tokens in enumerate(lengths)]
        alike = [share_of(refs, rank, 4, 4, by_length=True) for rank in range(4)]
        even = [Cut(4, None, by_length=True, packed=True).share(refs, rank, 4) for rank in range(4)]
        assert {i for share in alike for b in share for i in b} == {i for share in even for b in share for i in b}
        before.append(spread_of(alike, lengths))
        after.append(spread_of(even, lengths))

    for (ranks, rows), (even_ranks, even_rows) in zip(before, after, strict=True):
        assert even_ranks < ranks / 2
        assert even_rows < rows


def test_a_loss_that_depends_on_its_micro_batch_keeps_the_published_order():
    refs = [ref(i, tokens) for i, tokens in enumerate([3, 9, 4, 8])]

    assert Cut(2, 12, by_length=False, packed=True).share(refs, 0, 1) == [[0, 1], [2, 3]]
    assert Cut(2, None, by_length=False, packed=True).share(refs, 0, 1) == [[0, 1], [2, 3]]
    assert Cut(2, 12, by_length=True, packed=True).share(refs, 0, 1) == [[1, 0], [3, 2]]


def test_only_padded_samples_share_a_micro_batch_with_their_like():
    refs = [ref(i, tokens) for i, tokens in enumerate([3, 9, 4, 8])]

    assert Cut(2, None, by_length=True, packed=False).share(refs, 0, 1) == [[1, 3], [2, 0]]
    assert Cut(2, None, by_length=True, packed=True).share(refs, 0, 1) == [[1, 0], [3, 2]]


def test_a_cursor_is_a_handful_of_ranges():
    progress = TrainingProgress()
    for ordinal in (0, 1, 2, 4, 5):
        progress.trained.add(ordinal)
    progress.quarantined.add(3)

    assert progress.cursor().trained == [(0, 2), (4, 5)]
    assert progress.cursor().quarantined == [(3, 3)]
