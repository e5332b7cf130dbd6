"""The fused step is the plain formula: logits, loss, counts and gradients, packed, padded, windowed, and by chunks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from disagg_core.contracts import sample_id_of
from disagg_core.drafts.figures import LossOutput
from disagg_core.drafts.method import FrozenParts, Sample
from disagg_core.drafts.p_eagle import attention, row_loss
from disagg_core.drafts.p_eagle.attention import chain_attention, plan_attention
from disagg_core.drafts.p_eagle.batch import PEagleBatcher, trained_positions
from disagg_core.drafts.p_eagle.loss import PEagleLoss, parallel_depths
from disagg_core.drafts.p_eagle.model import PEagleDraft
from disagg_core.drafts.p_eagle.options import PEagleSection
from disagg_core.errors import BadInput, IncompatibleDraft
from tests.benchmarks.baselines.eager_p_eagle import eager_p_eagle
from tests.unit.drafts.p_eagle.cases import gradients, packed_inputs, small_config, small_draft, worst_gradient

pytestmark = pytest.mark.unit

SHAPES = {"one sequence": ([40], 40), "packed": ([17, 9, 22], 48), "packed and padded": ([17, 9, 5], 40)}


@pytest.fixture
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices so small that every batch of these tests has several."""
    monkeypatch.setattr(attention, "_SLICE_ROWS", {"cpu": 11})
    monkeypatch.setattr(row_loss, "_SLICE_BYTES", {"cpu": 1})


# --- against the plain formula ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("pieces", ["whole", "sliced"])
def test_a_step_is_the_plain_formula(
    shape: str, window: int | None, pieces: str, request: pytest.FixtureRequest
) -> None:
    if pieces == "sliced":
        request.getfixturevalue("small_slices")
    draft = small_draft(sliding_window=window, layer_types=["sliding_attention"] * 3 if window else None)
    lengths, tokens = SHAPES[shape]
    inputs = packed_inputs(draft, lengths, tokens=tokens)
    assert draft.config.sliding_window == window

    found, expected = parallel_depths(draft, inputs), eager_p_eagle(draft, inputs)

    torch.testing.assert_close(found.logits[0], expected.logits, atol=2e-5, rtol=1e-4)
    assert torch.equal(found.position_mask[0], expected.position_mask)
    assert torch.equal(found.accuracy_correct, expected.correct)
    assert torch.equal(found.accuracy_total, expected.counted)
    assert found.loss.item() == pytest.approx(expected.loss.item(), abs=1e-5)
    assert (found.loss_num / found.loss_den).item() == pytest.approx(found.loss.item())
    assert worst_gradient(gradients(draft, found.loss), gradients(draft, expected.loss)) < 1e-4


def test_a_whole_vocabulary_is_the_plain_formula() -> None:
    draft = small_draft(draft_vocab_size=40)
    inputs = packed_inputs(draft, [30], tokens=30)

    found, expected = parallel_depths(draft, inputs), eager_p_eagle(draft, inputs)

    assert found.loss.item() == pytest.approx(expected.loss.item(), abs=1e-5)
    assert worst_gradient(gradients(draft, found.loss), gradients(draft, expected.loss)) < 1e-4


def test_gradients_are_the_loss_s_own_slopes() -> None:
    draft = small_draft(dtype=torch.float64, num_hidden_layers=2)
    inputs = packed_inputs(draft, [14], tokens=14)
    slopes = gradients(draft, parallel_depths(draft, inputs).loss)

    generator = torch.Generator().manual_seed(8)
    for name, parameter in draft.named_parameters():
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if name == "embed_tokens.weight":
            direction[draft.config.pad_token_id] = 0  # its row takes no gradient
        step, values = 1e-5, []
        for sign in (1, -1):
            with torch.no_grad():
                parameter += sign * step * direction
                values.append(parallel_depths(draft, inputs).loss.item())
                parameter -= sign * step * direction
        numeric = (values[0] - values[1]) / (2 * step)
        assert float((slopes[name] * direction).sum()) == pytest.approx(numeric, rel=1e-5, abs=1e-9), name


def test_the_padding_token_s_row_is_not_trained() -> None:
    draft = small_draft()
    inputs = packed_inputs(draft, [30], tokens=30)
    inputs["input_ids"][0, 4:9] = draft.config.pad_token_id

    rows = gradients(draft, parallel_depths(draft, inputs).loss)["embed_tokens.weight"]

    assert not rows[draft.config.pad_token_id].any()
    assert rows[draft.config.mask_token_id].any()


def test_an_attention_s_gradients_are_a_dense_one_s(small_slices: None) -> None:
    draft = small_draft()
    inputs = packed_inputs(draft, [12, 20], tokens=32)
    order = torch.argsort(inputs["anchor_pos"] * 8 + inputs["depth"])
    anchors, depths = inputs["anchor_pos"][order], inputs["depth"][order]
    plan = plan_attention((anchors >= 12).long(), anchors, depths, None, torch.device("cpu"))
    generator = torch.Generator().manual_seed(2)
    query, key, value = (torch.randn(len(order), n, 6, generator=generator).requires_grad_() for n in (4, 2, 2))
    weight = torch.randn(query.shape, generator=generator)

    found = torch.autograd.grad((chain_attention(plan, query, key, value) * weight).sum(), (query, key, value))

    a, b, d, e = anchors[:, None], anchors[None, :], depths[:, None], depths[None, :]
    visible = ((a >= 12) == (b >= 12)) & (((e == 0) & (b <= a)) | ((a == b) & (e <= d)))
    scores = torch.einsum("qhd,khd->hqk", query, key.repeat_interleave(2, 1)) / 6**0.5
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    dense = torch.einsum("hqk,khd->qhd", weights, value.repeat_interleave(2, 1))
    for got, wanted in zip(found, torch.autograd.grad((dense * weight).sum(), (query, key, value)), strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)


# --- who sees whom ----------------------------------------------------------------------------------------------------


def test_what_comes_after_an_anchor_changes_none_of_its_depths() -> None:
    draft = small_draft()
    inputs = packed_inputs(draft, [40], tokens=40)
    before = parallel_depths(draft, inputs).logits[0]

    changed = {**inputs, "input_ids": inputs["input_ids"].clone(), "hidden_states": inputs["hidden_states"].clone()}
    changed["input_ids"][0, 21:] = 7
    changed["hidden_states"][0, 21:] += 1.0
    after = parallel_depths(draft, changed).logits[0]

    early = inputs["anchor_pos"] <= 20
    assert torch.equal(before[early], after[early])
    assert not torch.allclose(before[~early], after[~early])


def test_sequences_of_a_packed_row_do_not_see_each_other() -> None:
    draft = small_draft()
    inputs = packed_inputs(draft, [15, 25], tokens=40)
    before = parallel_depths(draft, inputs).logits[0]

    inputs["hidden_states"][0, :15] += 1.0
    after = parallel_depths(draft, inputs).logits[0]

    second = inputs["anchor_pos"] >= 15
    assert torch.equal(before[second], after[second])


# --- batches ----------------------------------------------------------------------------------------------------------


def sample(draft: PEagleDraft, ordinal: int, tokens: int) -> Sample:
    generator = torch.Generator().manual_seed(50 + ordinal)
    hidden = draft.config.hidden_size
    tensors = {
        "input_ids": torch.randint(4, 39, (tokens,), generator=generator, dtype=torch.int32),
        "loss_mask": (torch.rand(tokens, generator=generator) < 0.7).to(torch.uint8),
        "aux_hidden_states": torch.randn(tokens, 3 * hidden, generator=generator),
        "last_hidden_state": torch.randn(tokens, hidden, generator=generator),
    }
    return Sample(sample_id_of(ordinal), tensors)


def batcher_of(draft: PEagleDraft) -> PEagleBatcher:
    return PEagleBatcher(PEagleSection(depths=draft.config.depths, mask_token_id=39), draft.config, seed=5)


def window_of(draft: PEagleDraft, lm_head: Tensor, *groups: list[Sample], multiple_of: int = 1) -> list[LossOutput]:
    batcher = batcher_of(draft)
    batches = [batcher.collate(group, multiple_of=multiple_of) for group in groups]
    rows = torch.tensor(sum(batcher.normalisers(batch)["rows"] for batch in batches))
    module = PEagleLoss(draft, lm_head)
    outputs = [module(batch, {"rows": rows}) for batch in batches]
    torch.stack([output.total for output in outputs]).sum().backward()
    return outputs


def test_a_padded_batch_is_its_samples_one_by_one() -> None:
    lm_head = torch.randn(40, 16, generator=torch.Generator().manual_seed(9)) * 0.7
    together, apart = small_draft(), small_draft()
    samples = [sample(together, ordinal, tokens) for ordinal, tokens in enumerate((33, 12, 20))]

    (whole,) = window_of(together, lm_head, samples, multiple_of=64)
    parts = window_of(apart, lm_head, *([one] for one in samples))

    assert whole.total.item() == pytest.approx(sum(part.total.item() for part in parts), abs=1e-6)
    for name, parameter in together.named_parameters():
        other = dict(apart.named_parameters())[name].grad
        assert parameter.grad is not None
        assert other is not None
        torch.testing.assert_close(parameter.grad, other, atol=1e-6, rtol=1e-4)


def test_a_sample_is_trained_as_the_plain_formula_says() -> None:
    draft = small_draft(draft_vocab_size=40)
    lm_head = torch.randn(40, 16, generator=torch.Generator().manual_seed(9)) * 0.7
    one = sample(draft, 0, 30)
    batch = batcher_of(draft).collate([one])
    inputs = {
        "input_ids": batch.input_ids,
        "loss_mask": batch.mask,
        "hidden_states": batch.hidden_states,
        "target_logits": batch.teacher @ lm_head.T,
        "lengths": torch.tensor([30]),
        "anchor_pos": batch.anchors,
        "depth": batch.depths,
    }
    expected = eager_p_eagle(draft, inputs)
    wanted = gradients(draft, expected.loss)
    draft.zero_grad()

    (output,) = window_of(draft, lm_head, [one])

    assert output.total.item() == pytest.approx(expected.loss.item(), abs=1e-5)
    found = {name: p.grad for name, p in draft.named_parameters() if p.grad is not None}
    assert worst_gradient(found, wanted) < 1e-4
    assert output.ratios["accuracies"].numerator.tolist() == expected.correct.tolist()
    assert output.ratios["accuracies"].denominator.tolist() == expected.counted.tolist()


def test_a_position_is_trained_when_the_token_two_further_on_is() -> None:
    assert trained_positions(torch.tensor([1, 1, 0, 1, 1])).tolist() == [False, True, True, False, False]
    assert trained_positions(torch.tensor([1])).tolist() == [False]


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_states": torch.zeros(1, 20, 47)}, "hidden_states: expected 48, found 47"),
        ({"target_logits": torch.zeros(1, 20, 24)}, "target_logits: expected 40, found 24"),
        ({"target_logits": torch.zeros(1, 19, 40)}, r"target_logits: expected shape \[1, 20\]"),
        ({"lengths": torch.tensor([12, 12])}, "lengths: expected a sum of at most 20, found 24"),
        ({"anchor_pos": torch.tensor([0]), "depth": torch.tensor([20])}, "anchor_pos, depth: expected rows from 0"),
        ({"anchor_pos": torch.tensor([0]), "depth": torch.tensor([0, 1])}, "depth: expected 1 of them"),
        ({"anchor_pos": torch.tensor([0]), "depth": torch.tensor([6])}, "depth: expected below 5, found 6"),
    ],
)
def test_inputs_that_do_not_fit_are_named(changes: dict[str, Tensor], named: str) -> None:
    draft = small_draft()
    with pytest.raises(BadInput, match=named):
        parallel_depths(draft, packed_inputs(draft, [20], tokens=20) | changes)


def test_a_missing_input_is_named() -> None:
    draft = small_draft()
    inputs = packed_inputs(draft, [20], tokens=20)
    del inputs["depth"]
    with pytest.raises(BadInput, match="missing: depth"):
        parallel_depths(draft, inputs)


def test_a_draft_without_its_vocabulary_refuses() -> None:
    draft = PEagleDraft(small_config())
    draft.attach(FrozenParts(*torch.ones(2, 40, 16)))
    with pytest.raises(IncompatibleDraft, match="vocabulary map"):
        parallel_depths(draft, packed_inputs(small_draft(), [20], tokens=20))
