"""What a block sees: its context and itself, in training as in decoding, with every kernel, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from disagg_core.drafts.dflash import DFlashDraft, dflash_loss
from disagg_core.drafts.dflash.attention import BlockAttention
from disagg_core.drafts.dflash.batch import DFlashBatch, plan_blocks
from disagg_core.drafts.dflash.blocks import run_blocks
from disagg_core.drafts.dflash.config import LayerMask
from disagg_core.drafts.dflash.drafter import ContextCache, draft_block
from tests.benchmarks.baselines.eager_dflash import dense_mask, eager_dflash
from tests.unit.drafts.dflash.cases import (
    BLOCK,
    KINDS,
    blocks_of,
    gradients,
    small_batch,
    small_config,
    small_draft,
    worst_gradient,
)

pytestmark = pytest.mark.unit

LENGTHS = [23, 14, 18]
MASKS = [
    LayerMask(None, False),
    LayerMask(None, True),
    LayerMask(6, True),
    LayerMask(4, False),
    LayerMask(5, True, by_anchor=True),
]


def hidden_of(draft: DFlashDraft, batch: dict[str, Tensor], **options: Any) -> Tensor:
    output = dflash_loss(draft, batch, **blocks_of(batch), return_logits=True, **options)
    assert output.hidden is not None
    return output.hidden


@pytest.mark.parametrize("kernel", ["gathered", "flex"])
@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("group", [1, 3])
def test_kernels_attend_as_a_dense_mask_says(kernel: Any, mask: LayerMask, group: int) -> None:
    config = small_config(num_attention_heads=2 * group)
    batch = DFlashBatch.of(small_batch(config, LENGTHS))
    plan = plan_blocks(batch, BLOCK, 0, torch.device("cpu"))
    generator = torch.Generator().manual_seed(3)
    query = torch.randn(plan.blocks, BLOCK, 2 * group, 6, generator=generator)
    own = tuple(torch.randn(plan.blocks, BLOCK, 2, 6, generator=generator) for _ in range(2))
    context = tuple(torch.randn(len(plan.context_flat), 2, 6, generator=generator) for _ in range(2))

    found = BlockAttention(plan, kernel)(mask, query, own, context)

    seen = dense_mask(batch.anchors, batch.block_keep, max(LENGTHS), BLOCK, mask)
    slots = seen.unflatten(1, (-1, BLOCK)).flatten(0, 1)[plan.block_flat]  # [M, K, tokens + N * K]
    for block in range(plan.blocks):
        rows = slots[block]
        far = rows[:, : int(plan.anchors[block])]
        begin = int(plan.context_start[block])
        keys, values = (
            torch.cat((c[begin : begin + far.shape[1]], o[block])).repeat_interleave(group, 1)
            for c, o in zip(context, own, strict=True)
        )
        at = max(LENGTHS) + int(plan.block_flat[block]) % batch.anchors.shape[1] * BLOCK
        allowed = torch.cat((far, rows[:, at : at + BLOCK]), dim=1)
        scores = torch.einsum("qhd,khd->hqk", query[block], keys) * 6**-0.5
        weights = scores.masked_fill(~allowed, float("-inf")).softmax(-1)
        expected = torch.einsum("hqk,khd->qhd", weights, values)
        torch.testing.assert_close(found[block], expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_loss_and_gradients_are_those_of_the_plain_formula(kind: dict[str, Any]) -> None:
    draft = small_draft(torch.float64, **kind)
    batch = small_batch(draft.config, LENGTHS, dtype=torch.float64)

    found = dflash_loss(draft, batch, **blocks_of(batch), gamma=2.0)
    expected = eager_dflash(draft, batch, gamma=2.0)

    torch.testing.assert_close(found.loss, expected.loss)
    torch.testing.assert_close(found.ce * found.weight_mask, expected.ce * expected.mask)
    assert torch.equal(found.weight_mask.double(), expected.mask)
    assert worst_gradient(gradients(draft, found.loss), gradients(draft, expected.loss)) < 1e-10


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_a_trained_block_is_the_block_that_is_decoded(kind: dict[str, Any]) -> None:
    """With context 0 ... p - 1 in the cache, in two parts, the block behind it has the same states."""
    draft = small_draft(**kind)
    batch = small_batch(draft.config, LENGTHS)
    trained = hidden_of(draft, batch)

    for row, column in batch["block_keep"].nonzero().tolist():
        anchor = int(batch["anchors"][row, column])
        cache = ContextCache.empty(draft, 1)
        for part in (slice(0, anchor // 2), slice(anchor // 2, anchor)):
            positions = torch.arange(anchor)[None, part]
            cache.extend(draft, batch["hidden_states"][row : row + 1, part], positions)
        ids = torch.full((1, BLOCK), draft.config.mask_token_id)
        ids[0, 0] = batch["input_ids"][row, anchor]
        decoded = draft_block(draft, cache, ids, anchor + torch.arange(BLOCK)[None])
        torch.testing.assert_close(decoded[0], trained[row, column], atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_a_block_sees_nothing_at_or_after_its_anchor(kind: dict[str, Any]) -> None:
    draft = small_draft(**kind)
    batch = small_batch(draft.config, [24], anchors=6)
    before = hidden_of(draft, batch)
    for column, anchor in enumerate(batch["anchors"][0].tolist()):
        changed = {name: tensor.clone() for name, tensor in batch.items()}
        changed["hidden_states"][0, anchor:] += 1.0
        changed["input_ids"][0, anchor + 1 :] = 0
        after = hidden_of(draft, changed)
        assert torch.equal(after[0, column], before[0, column])
        assert column + 1 == batch["anchors"].shape[1] or not torch.equal(after[0, column + 1], before[0, column + 1])


def test_a_block_sees_what_lies_before_its_anchor() -> None:
    draft = small_draft()
    batch = small_batch(draft.config, [24])
    before = hidden_of(draft, batch)
    batch["hidden_states"][0, 0] += 1.0
    assert not torch.isclose(hidden_of(draft, batch), before).all(-1).any()


def test_a_sliding_layer_sees_no_further_than_its_window() -> None:
    draft = small_draft(layer_types=["sliding_attention"] * 2, sliding_window=6)
    batch = small_batch(draft.config, [24])
    batch["anchors"], batch["block_keep"] = torch.tensor([[10]]), torch.tensor([[True]])
    before = hidden_of(draft, batch)
    batch["hidden_states"][0, :5] += 1.0  # slot 0 at 10 sees 5 to 9
    assert torch.equal(hidden_of(draft, batch), before)
    batch["hidden_states"][0, 5] += 1.0
    changed = (hidden_of(draft, batch) != before).any(-1)[0, 0]
    assert changed.tolist() == [True, True, True, True]  # the others see slot 0


def test_blocks_do_not_see_each_other() -> None:
    draft = small_draft()
    batch = small_batch(draft.config, [24], anchors=6)
    before = hidden_of(draft, batch)
    alone = {**batch, "anchors": batch["anchors"][:, 2:3], "block_keep": batch["block_keep"][:, 2:3]}
    torch.testing.assert_close(hidden_of(draft, alone)[0, 0], before[0, 2], atol=1e-6, rtol=0)
    changed = {**batch, "input_ids": batch["input_ids"].clone()}
    changed["input_ids"][0, batch["anchors"][0, 3]] += 1
    differs = (hidden_of(draft, changed) != before).flatten(2).any(-1)[0]
    assert differs.tolist() == [column == 3 for column in range(batch["anchors"].shape[1])]


def test_a_padded_batch_is_its_samples_one_by_one() -> None:
    draft = small_draft()
    together = small_batch(draft.config, LENGTHS, width=32)
    whole = dflash_loss(draft, together, **blocks_of(together), return_logits=True)
    assert whole.hidden is not None
    found = gradients(draft, whole.loss)
    parts = []
    for row, length in enumerate(LENGTHS):
        alone = {name: t[row : row + 1] for name, t in together.items()}
        alone |= {name: alone[name][:, :length] for name in ("input_ids", "loss_mask", "hidden_states")}
        output = dflash_loss(draft, alone, **blocks_of(alone), normaliser=whole.loss_den, return_logits=True)
        assert output.hidden is not None
        torch.testing.assert_close(output.hidden[0], whole.hidden[row], atol=1e-6, rtol=0)
        parts.append(output.loss)
    torch.testing.assert_close(sum(parts), whole.loss, atol=1e-6, rtol=0)
    assert worst_gradient(found, gradients(draft, sum(parts))) < 1e-5


def test_an_anchor_at_the_start_has_no_context_and_works() -> None:
    draft = small_draft()
    batch = small_batch(draft.config, [6, 9])
    batch["loss_mask"][:, :6] = 1
    batch["anchors"], batch["block_keep"] = torch.tensor([[0, 4], [0, 0]]), torch.tensor([[True, True], [True, False]])

    output = dflash_loss(draft, batch, **blocks_of(batch))

    assert output.weight_mask[0].tolist() == [[0, 1, 1, 1], [0, 1, 0, 0]]
    assert all(torch.isfinite(g).all() for g in gradients(draft, output.loss).values())


def test_a_block_of_one_layer_and_two_slots_predicts_the_next_token() -> None:
    """C = 1, n = 1, K = 2: x[p + 1] from x[p] and what lies before p."""
    draft = small_draft(num_hidden_layers=1, block_size=2, target_layer_ids=[2])
    batch = small_batch(draft.config, [12])
    output = dflash_loss(draft, batch, **blocks_of(batch), return_logits=True)
    following = batch["input_ids"][0, batch["anchors"][0] + 1]
    assert torch.equal(output.target_ids[0, :, 1], following)
    assert output.weight_mask[0].tolist() == [[0.0, 1.0]] * len(following)


def test_checkpointing_changes_nothing() -> None:
    draft = small_draft(**KINDS["sliding"])
    batch = DFlashBatch.of(small_batch(draft.config, LENGTHS))
    plan = plan_blocks(batch, BLOCK, draft.config.mask_token_id, torch.device("cpu"))
    found = []
    for again in (False, True):
        states = run_blocks(draft, batch.hidden_states, plan, draft.config.layer_masks, "gathered", checkpointing=again)
        found.append(gradients(draft, states.pow(2).sum()))
    assert worst_gradient(*found) < 1e-6
