"""What a slot knows: the block's context, its anchor and the tokens before it; the same in training and decoding."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from disagg_core.drafts.dspark import WalkingDrafter, dspark_loss
from disagg_core.drafts.sampling import Sampler
from tests.unit.drafts.dspark.cases import (
    ANCHORS,
    BLOCK,
    BLOCKS,
    HEADS,
    KEEP,
    TRAINED,
    biases,
    decoded_states,
    small_batch,
    small_draft,
)

pytestmark = pytest.mark.unit
heads = pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)


def outputs(draft: Any, batch: dict[str, torch.Tensor]) -> Any:
    return dspark_loss(draft, batch, anchors=ANCHORS, block_keep=KEEP, return_logits=True)


@heads
@torch.no_grad()
def test_a_trained_block_is_the_block_that_is_decoded(head: dict[str, Any]) -> None:
    draft, batch = small_draft(**head), small_batch()

    found = outputs(draft, batch)

    for row, block in BLOCKS:
        anchor, count = int(ANCHORS[row, block]), int(TRAINED[row, block].sum())
        hidden = decoded_states(draft, batch, row, anchor)
        base = draft.logits(hidden)
        torch.testing.assert_close(found.hidden[row, block], hidden, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found.base_logits[row, block], base, atol=1e-5, rtol=1e-5)
        known = base[:count] + biases(draft, hidden[:count], batch["input_ids"][row, anchor : anchor + count])
        torch.testing.assert_close(found.logits[row, block, :count], known, atol=1e-5, rtol=1e-5)


@heads
@torch.no_grad()
def test_the_walk_of_a_block_is_what_is_proposed(head: dict[str, Any]) -> None:
    draft, batch = small_draft(**head), small_batch()
    found = outputs(draft, batch)

    for row, block in BLOCKS:
        anchor = int(ANCHORS[row, block])
        if anchor == 0:
            continue  # there is no prompt before it
        prompt, first = batch["input_ids"][row, :anchor].tolist(), batch["input_ids"][row, anchor : anchor + 1]
        states = batch["hidden_states"][row : row + 1, :anchor]
        drafter = WalkingDrafter(draft, Sampler(0.0), [prompt], states, first)
        proposed = drafter.propose(BLOCK, torch.tensor([anchor]))
        assert proposed.ids[0].tolist() == found.walk_tokens[row, block].tolist()
        walked = [int(first), *proposed.ids[0].tolist()]
        hidden = found.hidden[row, block]
        logits = draft.logits(hidden) + biases(draft, hidden, torch.tensor(walked[:-1]))
        torch.testing.assert_close(found.walk_logits[row, block], logits, atol=1e-5, rtol=1e-5)


@heads
@torch.no_grad()
def test_a_block_sees_nothing_at_or_after_its_anchor_but_the_tokens_before_a_slot(head: dict[str, Any]) -> None:
    draft, batch = small_draft(**head), small_batch()
    before = outputs(draft, batch)

    for row, block in BLOCKS:
        anchor = int(ANCHORS[row, block])
        changed = {name: tensor.clone() for name, tensor in batch.items()}
        changed["input_ids"][row, anchor + 2 :] = 0
        changed["hidden_states"][row, anchor:] += 1
        changed["last_hidden_state"] += 1
        after = outputs(draft, changed)
        for name in ("hidden", "base_logits", "walk_logits", "walk_tokens"):
            assert torch.equal(getattr(after, name)[row, block], getattr(before, name)[row, block]), name
        assert torch.equal(after.logits[row, block, :2], before.logits[row, block, :2])


@torch.no_grad()
def test_a_block_sees_what_lies_before_its_anchor() -> None:
    draft, batch = small_draft(), small_batch()
    changed = {name: tensor.clone() for name, tensor in batch.items()}
    changed["hidden_states"][0, 6] += 1

    before, after = outputs(draft, batch), outputs(draft, changed)

    assert torch.equal(after.base_logits[0, 0], before.base_logits[0, 0])
    assert (after.base_logits[0, 1] != before.base_logits[0, 1]).any(-1).all()


@heads
@torch.no_grad()
def test_blocks_do_not_see_each_other(head: dict[str, Any]) -> None:
    draft, batch = small_draft(**head), small_batch()
    together = outputs(draft, batch)

    for row, block in BLOCKS:
        keep = torch.zeros_like(KEEP)
        keep[row, block] = True
        alone = dspark_loss(draft, batch, anchors=ANCHORS, block_keep=keep, return_logits=True)
        torch.testing.assert_close(alone.logits[row, block], together.logits[row, block], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_block_is_trained_up_to_its_first_untrained_label() -> None:
    found = outputs(small_draft(), small_batch())

    assert found.weight_mask.long().tolist() == TRAINED.tolist()
    assert torch.equal(found.target_ids[0, 0], small_batch()["input_ids"][0, 3:7])
    weights = torch.exp(-torch.arange(BLOCK) / 4.0)
    torch.testing.assert_close(found.loss_weights, TRAINED * weights)
