"""The loss over the slots: its formulas, its gradient, its window, and what it is told about."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from disagg_core.drafts.dflash import DFlashLoss, dflash_loss
from disagg_core.drafts.dflash import slot_loss as slots
from disagg_core.drafts.dflash.batch import DFlashBatch, DFlashBatcher
from disagg_core.drafts.dflash.method import METHOD
from disagg_core.drafts.dflash.options import BlockLossSection, DFlashSection, default_gamma
from disagg_core.drafts.figures import Ratio
from disagg_core.errors import BadInput
from tests.unit.drafts.dflash.cases import (
    KINDS,
    blocks_of,
    gradients,
    small_batch,
    small_config,
    small_draft,
    some_samples,
    target_parts,
    worst_gradient,
)

pytestmark = pytest.mark.unit

DPACE = ["dpace", "dpace_prefix", "dpace_continuation"]


@pytest.mark.parametrize(("block", "gamma"), [(16, 7.0), (10, 5.0), (8, 4.0), (4, 2.0)])
def test_the_decay_is_the_published_one(block: int, gamma: float) -> None:
    assert default_gamma(block) == gamma


@pytest.mark.parametrize("type", DPACE)
def test_dpace_weighs_slots_as_its_formula_says(type: Any) -> None:
    """Written down slot by slot, with holes, in plain numbers."""
    draft = small_draft()
    batch = small_batch(draft.config, [60, 40], anchors=12)
    section = BlockLossSection(type=type, dpace_alpha=0.25)
    output = dflash_loss(draft, batch, **blocks_of(batch), loss=section)
    holes = 0
    for row, column in batch["block_keep"].nonzero().tolist():
        mask, ce = output.weight_mask[row, column].tolist(), output.ce[row, column].tolist()
        holes += mask[1:] not in ([1, 1, 1], [1, 1, 0], [1, 0, 0])
        confidence = [0.75 * math.exp(-c) + 0.25 if m else 1.0 for c, m in zip(ce, mask, strict=True)]
        prefix = [math.prod(confidence[: slot + 1]) for slot in range(4)]
        suffix = [sum(p * m for p, m in list(zip(prefix, mask, strict=True))[slot:]) for slot in range(4)]
        wanted = {
            "dpace": suffix,
            "dpace_prefix": prefix,
            "dpace_continuation": [s / p for s, p in zip(suffix, prefix, strict=True)],
        }[type]
        expected = torch.tensor([m * w for m, w in zip(mask, wanted, strict=True)])
        torch.testing.assert_close(output.loss_weights[row, column], expected, atol=1e-5, rtol=1e-5)
    assert holes, "some block has a hole in its mask"
    assert output.loss_den == output.weight_mask.sum()
    by_sample = dflash_loss(
        draft, batch, **blocks_of(batch), loss=section.model_copy(update={"normalisation": "sequences"})
    )
    assert by_sample.loss_den == 2
    torch.testing.assert_close(by_sample.loss_num, output.loss_num)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize("type", ["dflash", "dpace"])
def test_the_gradient_is_the_slope_of_the_loss(kind: dict[str, Any], type: Any) -> None:
    """By finite differences; D-PACE's weights are held where they are."""
    draft = small_draft(torch.float64, **kind)
    batch = small_batch(draft.config, [17, 11], dtype=torch.float64)
    first = dflash_loss(draft, batch, **blocks_of(batch), loss=BlockLossSection(type=type))
    found = gradients(draft, first.loss)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in draft.named_parameters():
        if not parameter.requires_grad:
            continue
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        ends = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                parameter += step * direction
                moved = dflash_loss(draft, batch, **blocks_of(batch), loss=BlockLossSection(type=type))
                ends.append(float((first.loss_weights * moved.ce).sum() / first.loss_den))
                parameter -= step * direction
        slope = (ends[0] - ends[1]) / 2e-6
        assert slope == pytest.approx(float((found[name] * direction).sum()), rel=1e-5, abs=1e-8), name


def test_slices_of_the_vocabulary_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    draft = small_draft(torch.float64)
    batch = small_batch(draft.config, [30, 20], anchors=9, dtype=torch.float64)
    section = BlockLossSection(type="dpace")
    whole = dflash_loss(draft, batch, **blocks_of(batch), loss=section)
    expected = gradients(draft, whole.loss)
    monkeypatch.setattr(slots, "_SLICE_BYTES", {"cpu": 1})

    sliced = dflash_loss(draft, batch, **blocks_of(batch), loss=section)

    torch.testing.assert_close(sliced.loss, whole.loss)
    assert worst_gradient(gradients(draft, sliced.loss), expected) < 1e-12


def test_labels_may_be_the_targets_own_choice() -> None:
    draft = small_draft()
    batch = small_batch(draft.config, [20, 15])
    output = dflash_loss(draft, batch, **blocks_of(batch), loss=BlockLossSection(label="teacher"))
    choice = (batch["last_hidden_state"] @ draft.attached_head().T).argmax(-1)
    differing = 0
    for row, column, slot in output.weight_mask.nonzero().tolist():
        position = int(batch["anchors"][row, column]) + slot
        assert output.target_ids[row, column, slot] == choice[row, position - 1]
        differing += int(choice[row, position - 1] != batch["input_ids"][row, position])
    assert differing

    del batch["last_hidden_state"]
    with pytest.raises(BadInput, match="last_hidden_state"):
        dflash_loss(draft, batch, **blocks_of(batch), loss=BlockLossSection(label="teacher"))


def test_bad_batches_are_named() -> None:
    draft = small_draft()
    batch = small_batch(draft.config, [20])
    with pytest.raises(BadInput, match="hidden_states: expected 32 wide, found 30"):
        dflash_loss(draft, {**batch, "hidden_states": batch["hidden_states"][..., 2:]}, **blocks_of(batch))
    with pytest.raises(BadInput, match="loss_mask"):
        dflash_loss(draft, {**batch, "loss_mask": batch["loss_mask"][:, 1:]}, **blocks_of(batch))
    with pytest.raises(BadInput, match="missing: input_ids"):
        dflash_loss(draft, {k: v for k, v in batch.items() if k != "input_ids"}, **blocks_of(batch))


def window(batches: list[DFlashBatch], batcher: DFlashBatcher) -> dict[str, torch.Tensor]:
    sums = [batcher.normalisers(batch) for batch in batches]
    return {"loss": torch.tensor(sum(one["loss"] for one in sums))}


@pytest.mark.parametrize(
    "options", [{}, {"type": "dpace"}, {"type": "dpace", "normalisation": "sequences"}, {"label": "teacher"}]
)
def test_a_window_of_several_batches_is_the_window_of_one(options: dict[str, Any]) -> None:
    """The same samples in one batch, and in three padded to unlike widths: one loss, one gradient, the same figures."""
    config = small_config(vocab_size=5, mask_token_id=4)
    section = DFlashSection(block_size=4, anchors=6, loss=options)
    draft, parts = small_draft(vocab_size=5, mask_token_id=4), target_parts(config)
    module = DFlashLoss(draft, parts, section.loss, activation_checkpointing=False)
    batcher = METHOD.batcher(section, config, seed=3)
    samples = some_samples(config, [23, 9, 31, 12])
    results = []
    for cut in ([samples], [samples[:1], samples[1:3], samples[3:]]):
        batches = [batcher.collate(part, multiple_of=8) for part in cut]
        normalisers = window(batches, batcher)
        outputs = [module(batch, normalisers) for batch in batches]
        total = sum(output.total for output in outputs)
        sums = {
            name: Ratio(
                sum(o.ratios[name].numerator for o in outputs), sum(o.ratios[name].denominator for o in outputs)
            )
            for name in outputs[0].ratios
        }
        results.append((total, gradients(draft, total), METHOD.figures(sums)))
    (one, grads, figures), (other, other_grads, other_figures) = results
    torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)
    assert worst_gradient(grads, other_grads) < 1e-5
    assert float(one.detach()) == pytest.approx(figures["loss"], rel=1e-5)
    assert set(figures) == {"loss", "accuracies", "simulated_accept_length", "block_accept_length"}
    assert all(other_figures[name] == pytest.approx(figure, rel=1e-5) for name, figure in figures.items())
    first, second, third = figures["accuracies"]
    assert first * second > 0
    assert figures["simulated_accept_length"] == pytest.approx(1 + first + first * second + first * second * third)
    assert 1 < figures["block_accept_length"] < 4


def test_a_dummy_gives_every_parameter_a_finite_gradient() -> None:
    config = small_config()
    section = DFlashSection(block_size=4, loss={"label": "teacher"})
    draft = small_draft()
    module = DFlashLoss(draft, target_parts(config), section.loss, activation_checkpointing=True)
    batcher = METHOD.batcher(section, config, seed=3)
    batch = batcher.dummy()
    assert batcher.normalisers(None) == {"loss": 0.0}

    output = module(batch, {"loss": torch.tensor(5.0)})

    found = gradients(draft, output.total * 0)
    assert found.keys() == {name for name, p in draft.named_parameters() if p.requires_grad}
    assert all(torch.equal(g, torch.zeros_like(g)) for g in found.values())


@pytest.mark.parametrize("length", [3, 40])
def test_accept_lengths_pass_over_holes(length: int) -> None:
    """A slot that is not trained neither counts nor ends the run of right ones."""
    draft = small_draft()
    batch = small_batch(draft.config, [length], anchors=30)
    batch["loss_mask"][:, :2] = 1
    batch["anchors"], batch["block_keep"] = torch.arange(length)[None], torch.ones(1, length, dtype=torch.bool)
    output = dflash_loss(draft, batch, **blocks_of(batch), return_logits=True)
    right = output.pred_ids == output.target_ids
    for block in range(length):
        expected, counts = 1, output.weight_mask[0, block].tolist()
        for slot in range(4):
            if counts[slot] and not right[0, block, slot]:
                break
            expected += int(counts[slot])
        assert output.accept_len_per_block[0, block] == (expected if any(counts) else 0)
