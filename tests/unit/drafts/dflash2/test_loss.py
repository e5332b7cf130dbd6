"""The selector's loss beside DFlash's: which slots, which candidates, which weights, which slope."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from disagg_core.drafts.dflash.options import BlockLossSection
from disagg_core.drafts.dflash2 import loss as module
from disagg_core.drafts.dflash2.loss import DFlash2Loss, dflash2_loss
from disagg_core.drafts.dflash2.method import METHOD
from disagg_core.drafts.dflash2.options import DFlash2Section, SelectorSection
from disagg_core.drafts.figures import Ratio
from tests.unit.drafts.dflash.cases import (
    KINDS,
    blocks_of,
    gradients,
    small_batch,
    some_samples,
    target_parts,
    worst_gradient,
)
from tests.unit.drafts.dflash2.cases import small_config2, small_draft2

pytestmark = pytest.mark.unit

DROP, REPLACE = SelectorSection(missing="drop"), SelectorSection(missing="replace")


@pytest.mark.parametrize("choice", [DROP, REPLACE], ids=["drop", "replace"])
@pytest.mark.parametrize("type", ["dflash", "dpace"])
def test_the_selectors_loss_is_that_of_the_formula(choice: SelectorSection, type: Any) -> None:
    """Slot by slot, from the logits, in plain numbers."""
    draft = small_draft2()
    batch = small_batch(draft.config, [30, 20], anchors=9)
    section = BlockLossSection(type=type)
    output = dflash2_loss(draft, batch, **blocks_of(batch), loss=section, selector=choice, return_logits=True)
    base, total, weighed, found_some = output.base, 0.0, 0.0, set()
    assert base.logits is not None
    assert base.hidden is not None
    for row, column in batch["block_keep"].nonzero().tolist():
        anchor, ces = int(batch["anchors"][row, column]), {}
        for slot in (s for s in range(1, 4) if base.weight_mask[row, column, s]):
            logits, ids = base.logits[row, column, slot].topk(6)
            label = int(base.target_ids[row, column, slot])
            found = label in ids.tolist()
            found_some.add(found)
            if not found and choice is DROP:
                continue
            if not found:
                ids[-1], logits[-1] = label, base.logits[row, column, slot, label]
            before = batch["input_ids"][row, anchor + slot - 1]
            scores = draft.candidate_selector(base.hidden[row, column, slot], before, ids, logits)
            ces[slot] = float(-scores.log_softmax(0)[ids.tolist().index(label)])
        weights = base.loss_weights[row, column].tolist()
        if type == "dpace" and choice is REPLACE:
            prefix = [math.prod(0.5 * math.exp(-ces[i]) + 0.5 for i in ces if i <= s) for s in range(4)]
            weights = [sum(prefix[i] for i in ces if i >= s) for s in range(4)]
        total += sum(weights[slot] * ce for slot, ce in ces.items())
        weighed += sum(weights[slot] for slot in ces)
    assert found_some == {True, False}
    divisor = weighed if type == "dflash" else float(base.weight_mask.sum())
    assert float(output.selector_loss) == pytest.approx(total / divisor, rel=1e-5)
    assert float(output.loss) == pytest.approx(float(output.base_loss) + total / divisor, rel=1e-5)


def test_what_the_selector_is_shown_is_what_it_is_said_to_be() -> None:
    draft = small_draft2()
    batch = small_batch(draft.config, [30, 20], anchors=9)
    output = dflash2_loss(draft, batch, **blocks_of(batch), selector=REPLACE, return_logits=True)
    assert output.candidate_ids is not None
    assert output.has_target is not None
    assert output.target_index is not None
    assert output.scores is not None
    labels, mask = output.base.target_ids[:, :, 1:], output.base.weight_mask[:, :, 1:]
    chosen = output.candidate_ids.gather(3, output.scores.argmax(-1, keepdim=True)).squeeze(3)
    right = (chosen == labels) * mask
    assert torch.equal(output.correct, right.sum((0, 1)))
    assert float(output.candidate_recall) == pytest.approx(float((output.has_target * mask).sum() / mask.sum()))
    assert 0 < float(output.candidate_recall) < 1
    places = output.candidate_ids.gather(3, output.target_index[..., None]).squeeze(3)
    assert torch.equal(places == labels, output.has_target)


@pytest.mark.parametrize("kind", [{}, KINDS["capped"]], ids=["plain", "capped"])
@pytest.mark.parametrize("choice", [DROP, REPLACE], ids=["drop", "replace"])
def test_the_gradient_is_the_slope_of_the_loss(kind: dict[str, Any], choice: SelectorSection) -> None:
    draft = small_draft2(torch.float64, **kind)
    batch = small_batch(draft.config, [17, 11], dtype=torch.float64)

    def loss() -> torch.Tensor:
        return dflash2_loss(draft, batch, **blocks_of(batch), selector=choice).loss

    found = gradients(draft, loss())
    generator = torch.Generator().manual_seed(5)
    for name, parameter in draft.named_parameters():
        if not parameter.requires_grad:
            continue
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        ends = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                parameter += step * direction
                ends.append(float(loss()))
                parameter -= step * direction
        slope = (ends[0] - ends[1]) / 2e-6
        assert slope == pytest.approx(float((found[name] * direction).sum()), rel=1e-5, abs=1e-8), name


def test_slices_of_the_codebooks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    draft = small_draft2(torch.float64)
    batch = small_batch(draft.config, [17, 11], dtype=torch.float64)
    whole = dflash2_loss(draft, batch, **blocks_of(batch)).loss
    expected = gradients(draft, whole)
    monkeypatch.setattr(module, "_CODEBOOK_BYTES", {"cpu": 1})
    sliced = dflash2_loss(draft, batch, **blocks_of(batch)).loss
    torch.testing.assert_close(sliced, whole)
    assert worst_gradient(gradients(draft, sliced), expected) < 1e-12


@pytest.mark.parametrize("missing", ["replace", "drop"])
@pytest.mark.parametrize("type", ["dflash", "dpace"])
def test_a_window_of_several_batches_is_the_window_of_one(missing: Any, type: Any) -> None:
    changes = {"vocab_size": 8, "mask_token_id": 7, "selector_top_k": 3}
    config, draft = small_config2(**changes), small_draft2(**changes)
    section = DFlash2Section(
        block_size=4, anchors=6, loss={"type": type}, selector={"missing": missing, "loss_weight": 0.5}
    )
    loss = METHOD.loss(draft, target_parts(config), section, activation_checkpointing=False)
    assert isinstance(loss, DFlash2Loss)
    batcher = METHOD.batcher(section, config, seed=3)
    samples = some_samples(config, [23, 9, 31, 12])
    results = []
    for cut in ([samples], [samples[:1], samples[1:3], samples[3:]]):
        batches = [batcher.collate(part, multiple_of=8) for part in cut]
        normalisers = {"loss": torch.tensor(sum(batcher.normalisers(batch)["loss"] for batch in batches))}
        outputs = [loss(batch, normalisers) for batch in batches]
        sums = {
            name: Ratio(
                sum(o.ratios[name].numerator for o in outputs), sum(o.ratios[name].denominator for o in outputs)
            )
            for name in outputs[0].ratios
        }
        total = sum(output.total for output in outputs)
        results.append((total.detach(), gradients(draft, total), METHOD.figures(sums)))
    (one, grads, figures), (other, other_grads, other_figures) = results
    torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)
    assert worst_gradient(grads, other_grads) < 1e-5
    assert float(one) == pytest.approx(figures["loss"], rel=1e-5)
    assert figures["loss"] == pytest.approx(figures["base_loss"] + 0.5 * figures["selector_loss"], rel=1e-5)
    assert all(other_figures[name] == pytest.approx(figure, rel=1e-5) for name, figure in figures.items())
    assert len(figures["accuracies"]) == len(figures["base_accuracies"]) == 3
    assert 0 < figures["candidate_recall"] < 1


def test_a_dummy_gives_every_parameter_a_finite_gradient() -> None:
    section = DFlash2Section(block_size=4)
    draft = small_draft2()
    loss = METHOD.loss(draft, target_parts(draft.config), section, activation_checkpointing=True)
    output = loss(METHOD.batcher(section, draft.config, seed=3).dummy(), {"loss": torch.tensor(5.0)})
    found = gradients(draft, output.total * 0)
    assert found.keys() == {name for name, p in draft.named_parameters() if p.requires_grad}
    assert all(torch.equal(g, torch.zeros_like(g)) for g in found.values())
