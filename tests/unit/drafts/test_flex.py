"""Masks of ranges have the tiles that looking at every key would find, and what they hold."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask

from disagg_core.drafts.dflash.attention import flex_mask
from disagg_core.drafts.dflash.batch import DFlashBatch, plan_blocks
from disagg_core.drafts.dflash.config import LayerMask
from disagg_core.drafts.flex import TILE, Range, ranges_mask
from tests.unit.drafts.dflash.cases import small_batch, small_config
from tests.unit.training.device import PretendedDevice

pytestmark = pytest.mark.unit

CPU = torch.device("cpu")


def dense(counts: Tensor | None, indices: Tensor | None) -> Tensor:
    """Which tiles are listed, bool ``[n, m]``."""
    assert counts is not None
    assert indices is not None
    listed = torch.zeros(indices.shape[2:], dtype=torch.bool)
    for row, (count, order) in enumerate(zip(counts[0, 0].tolist(), indices[0, 0].tolist(), strict=True)):
        listed[row, order[:count]] = True
    return listed


def assert_as_if_every_key_had_been_looked_at(mask: BlockMask) -> Tensor:
    """Return what rows see, bool ``[rows, keys]``, after a comparison with PyTorch's mask of it."""
    rows, keys = mask.seq_lengths
    assert mask.kv_indices.is_contiguous()
    assert all(torch.equal(entry, mask.kv_indices[0]) for entry in mask.kv_indices)
    expected = create_block_mask(mask.mask_mod, 1, None, rows, keys, device="cpu")
    partial, full = dense(mask.kv_num_blocks, mask.kv_indices), dense(mask.full_kv_num_blocks, mask.full_kv_indices)
    theirs = dense(expected.full_kv_num_blocks, expected.full_kv_indices)
    assert mask.shape[1:] == expected.shape[1:]
    assert mask.BLOCK_SIZE == expected.BLOCK_SIZE
    assert not (partial & full).any()
    assert torch.equal(partial | full, expected.to_dense()[0, 0] != 0)
    assert not (full & ~theirs).any(), "a tile that is called full is seen whole"
    assert torch.equal(dense(mask.q_num_blocks, mask.q_indices), partial.T)
    assert torch.equal(dense(mask.full_q_num_blocks, mask.full_q_indices), full.T)
    return create_mask(mask.mask_mod, 1, None, rows, keys, device="cpu")[0, 0]


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 400),
    keys=st.integers(1, 700),
    ranges=st.integers(1, 2),
    step=st.sampled_from([1, 64, TILE]),
    seed=st.integers(0, 2**16),
)
def test_any_ranges_give_their_tiles(rows: int, keys: int, ranges: int, step: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    spread = max(1, keys // 4) if seed % 2 else 1  # rows that see about the same have tiles that are full
    drawn = []
    for _ in range(ranges):
        lowest = int(torch.randint(keys, (1,), generator=generator))
        begin = (lowest + torch.randint(spread, (rows,), generator=generator)).clamp(max=keys) // step * step
        end = (
            begin + torch.randint(keys, (1,), generator=generator) + torch.randint(spread, (rows,), generator=generator)
        )
        drawn.append(Range(begin, end.clamp(max=keys)))

    seen = assert_as_if_every_key_had_been_looked_at(ranges_mask(keys, *drawn))

    key = torch.arange(keys)
    expected = [(key >= one.begin[:, None]) & (key < one.end[:, None]) for one in drawn]
    assert torch.equal(seen, torch.stack(expected).any(0))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("window", "by_anchor"), [(None, False), (150, False), (150, True)])
def test_blocks_see_their_context_and_themselves(window: int | None, by_anchor: bool, causal: bool) -> None:
    """Slot by slot, over samples of which the second begins within a tile."""
    config = small_config()
    batch = small_batch(config, [700, 61, 300], anchors=100)
    batch.pop("last_hidden_state")
    size = config.block_size
    plan = plan_blocks(DFlashBatch.of(batch), size, config.mask_token_id, CPU)
    mask = LayerMask(window, causal, by_anchor)

    pattern = flex_mask(plan, mask, entries=2)

    seen = assert_as_if_every_key_had_been_looked_at(pattern)
    own = seen.shape[1] - plan.blocks * size
    assert own % TILE == 0
    assert 0 <= own - plan.context_rows < TILE
    assert window or dense(pattern.full_kv_num_blocks, pattern.full_kv_indices).any()
    for block, (start, anchor) in enumerate(zip(plan.context_start.tolist(), plan.bounds, strict=True)):
        for slot in range(size):
            expected = torch.zeros(seen.shape[1], dtype=torch.bool)
            before = anchor if window is None else window if by_anchor else window - 1 - slot
            expected[start + max(0, anchor - before) : start + anchor] = True
            last = slot + 1 if causal else size
            expected[own + block * size : own + block * size + last] = True
            assert torch.equal(seen[block * size + slot], expected)


def test_no_host_waits_for_the_ranges_of_a_mask() -> None:
    device, begin = PretendedDevice(), torch.arange(300)
    device.place([begin])

    with device:
        mask = ranges_mask(500, Range(begin, begin + 1), Range(begin * 0, begin))

    assert device.holds(mask.kv_indices)
    assert device.holds(mask.full_q_indices)
    assert device.waits == []
