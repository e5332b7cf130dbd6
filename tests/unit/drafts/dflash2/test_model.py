"""DFlash2's parts: convolutions that stay in their block, a selector, and both doing nothing at first."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from disagg_core.drafts import flex
from disagg_core.drafts.dflash import dflash_loss
from disagg_core.drafts.dflash.drafter import ContextCache, draft_block
from disagg_core.drafts.dflash2.drafter import walk
from disagg_core.drafts.dflash2.loss import DFlash2Output, dflash2_loss
from disagg_core.drafts.dflash2.method import METHOD
from disagg_core.drafts.dflash2.model import DFlash2Draft, GroupedDynamicCausalConv
from disagg_core.drafts.dflash2.options import DFlash2Section
from disagg_core.drafts.sampling import Sampler
from tests.unit.drafts.dflash.cases import BLOCK, KINDS, blocks_of, small_batch, small_draft, target_parts
from tests.unit.drafts.dflash2.cases import small_config2, small_draft2

pytestmark = pytest.mark.unit

LENGTHS = [23, 14, 18]
WARM = DFlash2Section(conv_group_size=4, selector_rank=5, selector_top_k=6)


def run(draft: DFlash2Draft, batch: dict[str, Tensor]) -> DFlash2Output:
    return dflash2_loss(draft, batch, **blocks_of(batch), return_logits=True)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_a_warm_start_is_the_dflash_draft_bit_for_bit(kind: dict[str, Any]) -> None:
    plain = small_draft(**kind)
    config, state = METHOD.adopted(WARM, plain.config, plain.serving_state_dict())
    draft = METHOD.model(config)
    draft.load_serving_state_dict(state)
    draft.attach(target_parts(plain.config))
    batch = small_batch(plain.config, LENGTHS)

    expected = dflash_loss(plain, batch, **blocks_of(batch), return_logits=True)
    found = run(draft, batch)

    assert found.base.hidden is not None
    assert found.base.logits is not None
    assert expected.hidden is not None
    assert expected.logits is not None
    assert torch.equal(found.base.hidden, expected.hidden)
    assert torch.equal(found.base.logits, expected.logits)
    assert torch.equal(found.base_loss, expected.loss.detach())
    assert found.walk is not None
    assert torch.equal(found.walk, expected.pred_ids[:, :, 1:]), "the selector chooses the likeliest"
    assert torch.equal(found.accept_len_per_block, expected.accept_len_per_block)


def test_a_fresh_draft_has_parts_that_do_nothing_and_can_learn() -> None:
    torch.manual_seed(0)
    draft = DFlash2Draft(small_config2())
    draft.attach(target_parts(draft.config))
    layer = draft.layers[0]
    assert not layer.attention_conv.kernel_projection.weight.any()
    assert layer.mlp_conv.base_kernel.tolist() == [[[1.0] * 16, [0.0] * 16]] * 2
    assert not draft.candidate_selector.successor_codebook.any()
    assert float(draft.candidate_selector.predecessor_codebook.detach().std()) == pytest.approx(0.02, rel=0.2)
    batch = small_batch(draft.config, LENGTHS)
    run(draft, batch).loss.backward()
    learning = (
        "candidate_selector.successor_codebook",
        "layers.1.mlp_conv.base_kernel",
        "layers.0.attention_conv.kernel_projection.weight",
    )
    for name in learning:
        gradient = dict(draft.named_parameters())[name].grad
        assert gradient is not None
        assert gradient.any(), name


@pytest.mark.parametrize("taps", [1, 2, 3])
def test_the_convolutions_are_those_of_the_formula(taps: int) -> None:
    torch.manual_seed(1)
    hidden, group, slots = 12, 4, 5
    conv = GroupedDynamicCausalConv(hidden, taps, group).double()
    for parameter in conv.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(3, slots, hidden, dtype=torch.float64)
    delta = (x @ conv.kernel_projection.weight.T).view(3, slots, 2, taps, hidden // group)

    def plain(values: Tensor, side: int) -> Tensor:
        result = torch.zeros_like(values)
        for block in range(3):
            for slot in range(slots):
                for tap in range(min(taps, slot + 1)):
                    for channel in range(hidden):
                        weight = conv.base_kernel[side, tap, channel] + delta[block, slot, side, tap, channel // group]
                        result[block, slot, channel] += weight * values[block, slot - tap, channel]
        return result

    torch.testing.assert_close(conv(x, torch.tanh), plain(torch.tanh(plain(x, 0)), 1))


@pytest.mark.slow
def test_the_convolutions_compute_the_same_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, for numbers of blocks that change."""
    torch.manual_seed(1)
    conv = GroupedDynamicCausalConv(16, 3, 4)
    for parameter in conv.parameters():
        torch.nn.init.normal_(parameter)
    for blocks in (3, 7, 5):
        x = torch.randn(blocks, 6, 16, requires_grad=True)
        wanted = (x, *conv.parameters())
        plain = conv(x, torch.tanh)
        with monkeypatch.context() as on_gpu:
            on_gpu.setattr(flex, "compiles", lambda device: True)
            found = conv(x, torch.tanh)
        torch.testing.assert_close(found, plain)
        expected = torch.autograd.grad(plain.square().sum(), wanted)
        torch.testing.assert_close(torch.autograd.grad(found.square().sum(), wanted), expected, rtol=1e-4, atol=1e-3)


def test_scores_are_those_of_the_formula() -> None:
    draft = small_draft2()
    selector = draft.candidate_selector
    hidden, before = torch.randn(3, 16), torch.tensor([4, 9, 0])
    ids, logits = torch.tensor([[1, 2], [3, 4], [5, 6]]), torch.randn(3, 2)
    found = selector(hidden, before, ids, logits)
    for row in range(3):
        gate = selector.predecessor_codebook[before[row]] * (selector.hidden_projection.weight @ hidden[row])
        for place in range(2):
            expected = logits[row, place] + (gate * selector.successor_codebook[ids[row, place]]).sum()
            assert float(found[row, place]) == pytest.approx(float(expected), abs=1e-5)


def test_the_walk_feeds_on_what_it_chose() -> None:
    draft = small_draft2()
    hidden, anchor = torch.randn(2, 3, 16), torch.tensor([5, 8])
    found = walk(draft, Sampler(0.0), hidden, anchor)
    assert found.probabilities is None
    for row in range(2):
        before = int(anchor[row])
        for slot in range(3):
            logits, ids = draft.logits(hidden[row, slot]).topk(6)
            scores = draft.candidate_selector(hidden[row, slot], torch.tensor(before), ids, logits)
            before = int(ids[scores.argmax()])
            assert int(found.ids[row, slot]) == before


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_a_trained_block_is_the_block_that_is_decoded(kind: dict[str, Any]) -> None:
    draft = small_draft2(**kind)
    batch = small_batch(draft.config, LENGTHS)
    output = run(draft, batch)
    assert output.base.hidden is not None
    assert output.walk is not None
    for row, column in batch["block_keep"].nonzero().tolist():
        anchor = int(batch["anchors"][row, column])
        cache = ContextCache.empty(draft, 1)
        cache.extend(draft, batch["hidden_states"][row : row + 1, :anchor], torch.arange(anchor)[None])
        ids = torch.full((1, BLOCK), draft.config.mask_token_id)
        ids[0, 0] = batch["input_ids"][row, anchor]
        decoded = draft_block(draft, cache, ids, anchor + torch.arange(BLOCK)[None])
        torch.testing.assert_close(decoded[0], output.base.hidden[row, column], atol=1e-5, rtol=0)
        walked = walk(draft, Sampler(0.0), decoded[:, 1:], ids[:, 0])
        assert torch.equal(walked.ids[0], output.walk[row, column])


def test_blocks_do_not_see_each_other_or_what_comes_after_their_anchor() -> None:
    draft = small_draft2()
    batch = small_batch(draft.config, [24], anchors=6)
    before = run(draft, batch).base.hidden
    assert before is not None
    for column, anchor in enumerate(batch["anchors"][0].tolist()):
        changed = {name: tensor.clone() for name, tensor in batch.items()}
        changed["hidden_states"][0, anchor:] += 1.0
        changed["input_ids"][0, anchor + 1 :] = 0
        after = run(draft, changed).base.hidden
        assert after is not None
        assert torch.equal(after[0, column], before[0, column])
