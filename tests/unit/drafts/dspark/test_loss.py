"""The three terms against the plain formulas, and their gradients against autograd and finite differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from disagg_core.drafts.dspark import DSparkDraft, dspark_loss, slot_terms
from disagg_core.drafts.dspark.options import DSparkLossSection
from disagg_core.errors import BadInput
from tests.unit.drafts.dspark.cases import ANCHORS, BLOCKS, HEADS, KEEP, plain_terms, small_batch, small_draft

pytestmark = pytest.mark.unit
heads = pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
BLOCKS_OF = {"anchors": ANCHORS, "block_keep": KEEP}


def trainable(draft: DSparkDraft) -> dict[str, torch.Tensor]:
    return {name: parameter for name, parameter in draft.named_parameters() if parameter.requires_grad}


@heads
def test_loss_and_gradients_are_those_of_the_plain_formula(head: dict[str, Any]) -> None:
    draft, batch = small_draft(torch.float64, **head), small_batch(torch.float64)

    found = dspark_loss(draft, batch, **BLOCKS_OF)
    plain = plain_terms(draft, batch)

    total = (0.1 * plain["ce"] + 0.9 * plain["l1"] + plain["confidence"]) / plain["weights"]
    torch.testing.assert_close(found.loss, total)
    torch.testing.assert_close(found.loss_den, plain["weights"])
    torch.testing.assert_close(found.ce_num, plain["ce"].detach())
    torch.testing.assert_close(found.l1_loss, (plain["l1"] / plain["weights"]).detach())
    torch.testing.assert_close(found.tau_sum, plain["tau"])
    if found.confidence_num is not None:
        torch.testing.assert_close(found.confidence_num, plain["confidence"].detach())
    weights = trainable(draft)
    ours = torch.autograd.grad(found.loss, list(weights.values()))
    theirs = torch.autograd.grad(total, list(weights.values()))
    for name, one, other in zip(weights, ours, theirs, strict=True):
        torch.testing.assert_close(one, other, msg=name)


@heads
def test_the_gradient_is_the_slope_of_the_loss(head: dict[str, Any]) -> None:
    """The confidence's target is a constant, so its term is left to the weights of its own head."""
    draft, batch = small_draft(torch.float64, **head), small_batch(torch.float64)
    generator = torch.Generator().manual_seed(11)
    for name, parameter in trainable(draft).items():
        weight = 1.0 if name.startswith("confidence_head") else 0.0
        section = DSparkLossSection(ce=0.3, l1=0.7, confidence=weight)
        draft.zero_grad()
        dspark_loss(draft, batch, loss=section, **BLOCKS_OF).loss.backward()
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        direction /= direction.norm()
        ends = []
        with torch.no_grad():
            for step in (1e-6, -2e-6):
                parameter += step * direction
                ends.append(dspark_loss(draft, batch, loss=section, **BLOCKS_OF).loss)
            parameter += 1e-6 * direction
        slope = (ends[0] - ends[1]) / 2e-6
        assert parameter.grad is not None
        torch.testing.assert_close((parameter.grad * direction).sum(), slope, atol=1e-7, rtol=1e-5, msg=name)


def test_slices_of_the_vocabulary_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, sliced = small_draft(torch.float64), small_draft(torch.float64)
    batch = small_batch(torch.float64)
    expected = dspark_loss(whole, batch, **BLOCKS_OF)
    expected.loss.backward()

    monkeypatch.setitem(slot_terms._SLICE_BYTES, "cpu", 1)
    found = dspark_loss(sliced, batch, **BLOCKS_OF)
    found.loss.backward()

    torch.testing.assert_close(found.loss, expected.loss)
    for name, parameter in trainable(sliced).items():
        torch.testing.assert_close(parameter.grad, trainable(whole)[name].grad, msg=name)


def test_the_window_divides_by_what_it_is_told() -> None:
    draft, batch = small_draft(torch.float64), small_batch(torch.float64)

    own = dspark_loss(draft, batch, **BLOCKS_OF)
    window = dspark_loss(draft, batch, normaliser=own.loss_den * 3, **BLOCKS_OF)
    counted = dspark_loss(draft, batch, loss=DSparkLossSection(normalisation="positions"), **BLOCKS_OF)

    torch.testing.assert_close(window.loss * 3, own.loss)
    assert float(counted.loss_den) == float(own.weight_mask.sum())
    torch.testing.assert_close(counted.ce_num, own.ce_num)


def test_a_draft_that_says_what_the_target_says_is_sure_to_be_kept() -> None:
    draft, batch = small_draft(torch.float64), small_batch(torch.float64)
    with torch.no_grad():
        draft.markov_head.markov_w2.weight.zero_()
    hidden = dspark_loss(draft, batch, return_logits=True, **BLOCKS_OF).hidden
    assert hidden is not None
    row, block = BLOCKS[0]
    anchor = int(ANCHORS[row, block])
    batch["last_hidden_state"][row, anchor : anchor + 4] = hidden[row, block].detach()
    keep = torch.zeros_like(KEEP)
    keep[row, block] = True

    found = dspark_loss(draft, batch, anchors=ANCHORS, block_keep=keep)

    torch.testing.assert_close(found.accept_rate[row, block], torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(found.tau_sum, torch.tensor(5.0, dtype=torch.float64))
    assert abs(float(found.l1_loss)) < 1e-9


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"last_hidden_state": None}, "expected last_hidden_state"),
        (
            {"last_hidden_state": torch.zeros(2, 18, 7)},
            r"last_hidden_state: expected .*16\], found .*7\]",
        ),
        ({"hidden_states": torch.zeros(2, 18, 16)}, r"hidden_states: expected \[2, 18, 32\], found \[2, 18, 16\]"),
        ({"loss_mask": torch.ones(2, 5)}, "loss_mask"),
    ],
    ids=["no last state", "narrow last state", "too few layers", "short mask"],
)
def test_bad_batches_are_named(change: dict[str, Any], said: str) -> None:
    batch = {name: tensor for name, tensor in (small_batch() | change).items() if tensor is not None}

    with pytest.raises(BadInput, match=said):
        dspark_loss(small_draft(), batch, **BLOCKS_OF)
