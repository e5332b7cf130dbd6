"""What the house relies on of every registered draft method; `disagg_core.drafts.method` says it in prose."""

from __future__ import annotations

import json
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

from disagg_core.drafts.method import DraftModel, ExportRequest, Sample
from disagg_core.drafts.registry import method_names, method_of
from disagg_core.errors import BadInput, IncompatibleDraft
from disagg_core.evaluation import generate_all
from tests.contract.drafts.kit import HIDDEN, LAYERS, OPTIONS, SEED, VOCAB, Case, gradients, tiny_facts, tiny_target

pytestmark = pytest.mark.unit


def assert_like(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], *, within: float) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        distance = float((found[name] - expected[name]).norm())
        assert distance <= within * max(1e-3, float(expected[name].norm())), name


# --- what is asked of a target ---------------------------------------------------------------------------------------


def test_every_method_is_in_this_suite() -> None:
    assert set(OPTIONS) == set(method_names())


def test_an_unknown_method_is_named_with_what_there_is() -> None:
    with pytest.raises(BadInput, match=r"draft\.method: expected one of .*eagle3.*found 'medusa'"):
        method_of("medusa")


def test_captured_layers_ascend_and_leave_out_the_last(case: Case) -> None:
    layers = case.capture.layers
    assert list(layers) == sorted(set(layers))
    assert layers[0] >= 0
    assert layers[-1] < LAYERS - 1
    assert case.config.layers == layers


def test_layers_that_the_target_lacks_are_refused(case: Case) -> None:
    wrong = (*case.capture.layers[:-1], LAYERS - 1)
    with pytest.raises(BadInput, match="layer"):
        case.method.capture(case.options, LAYERS, wrong)


def test_the_options_fit_the_tiny_target(case: Case) -> None:
    case.method.check(case.options, case.facts, max_tokens=64, draft_tokens=3)


small_case = cache(Case.of)


@given(mask=st.lists(st.integers(0, 1), min_size=1, max_size=24))
@settings(max_examples=40, deadline=None)
@pytest.mark.parametrize("name", method_names())
def test_a_sample_is_called_untrainable_exactly_when_it_has_no_position(name: str, mask: list[int]) -> None:
    case = small_case(name)
    batcher = case.method.batcher(case.options, case.config, seed=SEED)
    batch = batcher.collate([case.sample(0, len(mask), mask)])
    assert (case.method.untrainable(mask) is None) == (batcher.trainable_positions(batch) > 0)


@pytest.mark.parametrize("tokens", [3, 12, 40])
def test_no_sample_has_more_rows_of_logits_than_the_plan_says(case: Case, tokens: int) -> None:
    batcher = case.method.batcher(case.options, case.config, seed=SEED)
    batch = batcher.collate([case.sample(0, tokens, [1] * tokens)])

    planned = case.method.logit_rows(case.options, case.config, tokens)

    assert 0 < batcher.trainable_positions(batch) <= planned
    assert case.method.logit_rows(case.options, case.config, 1) == 0


# --- sums, not means -------------------------------------------------------------------------------------------------


def test_a_padded_batch_is_its_samples_one_by_one(case: Case) -> None:
    samples = [case.sample(0, 18), case.sample(1, 11), case.sample(2, 25)]
    together, apart = case.draft(), case.draft()

    whole = case.loss_of(together, samples, multiple_of=32)
    parts = case.loss_of(apart, *([sample] for sample in samples))

    assert float(whole.total) == pytest.approx(float(parts.total), abs=1e-6)
    assert_like(gradients(together), gradients(apart), within=1e-5)
    for name, ratio in whole.ratios.items():
        torch.testing.assert_close(ratio.value(), parts.ratios[name].value(), atol=1e-5, rtol=1e-5)


def test_the_total_is_the_loss_that_is_reported(case: Case) -> None:
    output = case.loss_of(case.draft(), [case.sample(0), case.sample(1)], [case.sample(2, 30)])

    figures = case.method.figures(output.ratios)

    assert figures["loss"] == pytest.approx(float(output.total), rel=1e-4)


def test_figures_have_what_progress_and_report_show(case: Case) -> None:
    figures = case.method.figures(case.loss_of(case.draft(), [case.sample(0)]).ratios)

    accuracies = figures["accuracies"]
    assert isinstance(accuracies, list)
    assert all(0.0 <= accuracy <= 1.0 for accuracy in accuracies)
    assert isinstance(figures["simulated_accept_length"], float)
    assert 1.0 <= figures["simulated_accept_length"] <= 1 + len(accuracies)
    json.dumps(figures)


def test_a_dummy_batch_weighs_nothing_and_looks_like_any_other(case: Case) -> None:
    draft = case.draft()
    batcher = case.method.batcher(case.options, case.config, seed=SEED)
    batch = batcher.collate([case.sample(0)])
    normalisers = {name: torch.tensor(value) for name, value in batcher.normalisers(batch).items()}
    module = case.method.loss(draft, case.parts, case.options, activation_checkpointing=False)

    dummy, real = module(batcher.dummy(), normalisers), module(batch, normalisers)
    (dummy.total * 0).backward()

    assert bool(dummy.total.isfinite())
    assert all(not gradient.any() for gradient in gradients(draft).values())
    assert {name: ratio.numerator.shape for name, ratio in dummy.ratios.items()} == {
        name: ratio.numerator.shape for name, ratio in real.ratios.items()
    }
    assert batcher.normalisers(None).keys() == batcher.normalisers(batch).keys()


def test_an_output_survives_what_fsdp_does_to_it(case: Case) -> None:
    output = case.loss_of(case.draft(), [case.sample(0)])

    leaves, spec = pytree.tree_flatten(output)
    again = pytree.tree_unflatten(leaves, spec)

    assert again.ratios.keys() == output.ratios.keys()
    assert torch.equal(again.total, output.total)


def test_every_trainable_weight_takes_part(case: Case) -> None:
    draft = case.draft()
    case.loss_of(draft, [case.sample(0, 30), case.sample(1, 24)])

    trainable = {name for name, parameter in draft.named_parameters() if parameter.requires_grad}
    assert {name for name, gradient in gradients(draft).items() if gradient.any()} == trainable
    assert case.method.parameters(case.config) == sum(
        parameter.numel() for parameter in draft.parameters() if parameter.requires_grad
    )


def test_recomputing_activations_changes_nothing(case: Case) -> None:
    plain, checkpointed = case.draft(), case.draft()
    case.loss_of(plain, [case.sample(0)])
    batcher = case.method.batcher(case.options, case.config, seed=SEED)
    batch = batcher.collate([case.sample(0)])
    normalisers = {name: torch.tensor(value) for name, value in batcher.normalisers(batch).items()}
    module = case.method.loss(checkpointed, case.parts, case.options, activation_checkpointing=True)
    module(batch, normalisers).total.backward()

    assert_like(gradients(checkpointed), gradients(plain), within=1e-6)


# --- randomness ------------------------------------------------------------------------------------------------------


def test_a_step_is_a_function_of_seed_and_sample(case: Case) -> None:
    samples = [case.sample(0, 40), case.sample(1, 40)]

    first = case.loss_of(case.draft(), samples)
    torch.manual_seed(12345)
    again = case.loss_of(case.draft(), samples)

    assert torch.equal(first.total, again.total)


def test_company_in_a_batch_changes_no_sample(case: Case) -> None:
    sample, other = case.sample(0, 40), case.sample(1, 12)
    batcher = case.method.batcher(case.options, case.config, seed=SEED)

    alone = batcher.normalisers(batcher.collate([sample]))
    beside = batcher.normalisers(batcher.collate([other, sample]))
    without = batcher.normalisers(batcher.collate([other]))

    for name in alone:
        assert beside[name] == pytest.approx(alone[name] + without[name]) or not batcher.by_length


# --- a draft, its files, and its target's parts ----------------------------------------------------------------------


def test_a_draft_without_its_frozen_parts_refuses_to_compute(case: Case) -> None:
    with pytest.raises(IncompatibleDraft, match="attach"):
        case.loss_of(case.bare_draft(), [case.sample(0)])


def test_a_checkpoint_holds_the_whole_draft_and_nothing_of_the_target(case: Case) -> None:
    draft, fresh = case.draft(), case.bare_draft()
    state = {name: tensor.clone() for name, tensor in draft.serving_state_dict().items()}

    fresh.load_serving_state_dict(state)
    fresh.attach(case.parts)

    samples = [case.sample(0)]
    assert torch.equal(case.loss_of(fresh, samples).total, case.loss_of(draft, samples).total)
    name = next(iter(state))
    del state[name]
    with pytest.raises(IncompatibleDraft, match=name.replace(".", r"\.")):
        case.bare_draft().load_serving_state_dict(state)


def written(case: Case, draft: DraftModel, format: str) -> tuple[dict, dict[str, torch.Tensor]]:
    masters = {name: tensor.detach().clone() for name, tensor in draft.serving_state_dict().items()}
    config, tensors = case.method.read(case.config.to_dict(), masters, "checkpoint")
    cast = {n: t.to(torch.bfloat16) if t.is_floating_point() else t for n, t in tensors.items()}
    request = ExportRequest(format=format, dtype="bfloat16", draft_tokens=3)
    return case.method.written(config, cast, request, case.parts)


def test_every_format_reads_back_bitwise_and_is_known_to_one_method_only(case: Case) -> None:
    draft = case.draft()
    for format in case.method.formats:
        document, tensors = written(case, draft, format)
        document = json.loads(json.dumps(document))

        config, back = case.method.read(document, tensors, format)

        assert [name for name in method_names() if method_of(name).recognises(document)] == [case.method.name]
        assert config.layers == case.config.layers
        for name, tensor in draft.serving_state_dict().items():
            expected = tensor.to(torch.bfloat16).float() if tensor.is_floating_point() else tensor
            assert torch.equal(back[name], expected), (format, name)


def test_a_published_draft_is_continued_as_it_is(case: Case) -> None:
    draft = case.draft()
    document, tensors = written(case, draft, next(iter(case.method.formats)))
    config, state = case.method.read(document, tensors, "export")

    continued = case.method.continued(config, state, case.facts, case.capture, case.vocab_map)

    for name, tensor in continued.serving_state_dict().items():
        assert torch.equal(tensor, state[name]), name


def test_a_draft_of_another_target_is_not_continued(case: Case) -> None:
    document, tensors = written(case, case.draft(), next(iter(case.method.formats)))
    config, state = case.method.read(document, tensors, "export")

    with pytest.raises(IncompatibleDraft, match="expected"):
        case.method.continued(config, state, tiny_facts(hidden_size=2 * HIDDEN), case.capture, case.vocab_map)


# --- decoding --------------------------------------------------------------------------------------------------------


def test_decoding_with_the_draft_says_what_the_target_says(case: Case) -> None:
    target, draft = tiny_target(), case.draft().eval().requires_grad_(False)
    prompts = [[5, 9, 11], [7, 3, 8, 20, 31, 6, 40], [VOCAB - 1]]
    most = case.method.most_draft_tokens(case.config)

    plain = generate_all(target, None, prompts, max_new_tokens=20)
    drafted = generate_all(target, draft, prompts, draft_tokens=min(3, most or 3), max_new_tokens=20)

    assert [generation.tokens for generation in drafted] == [generation.tokens for generation in plain]


def test_more_tokens_than_the_method_drafts_are_refused(case: Case) -> None:
    most = case.method.most_draft_tokens(case.config)
    if most is not None:
        with pytest.raises(BadInput, match="draft_tokens"):
            generate_all(tiny_target(), case.draft(), [[5, 9]], draft_tokens=most + 1, max_new_tokens=4)


def test_samples_hold_what_was_captured(case: Case) -> None:
    sample: Sample = case.sample(0, 9)
    assert len(sample) == 9
    assert set(sample.tensors) == set(case.capture.features(9, HIDDEN, "float32"))
