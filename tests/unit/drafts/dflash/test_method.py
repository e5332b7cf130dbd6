"""What the method asks of a target, and what it refuses before anything is started."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from disagg_core.contracts import Capture
from disagg_core.drafts.dflash import DFlashConfig
from disagg_core.drafts.dflash.method import METHOD, default_layers
from disagg_core.drafts.dflash.options import DFlashSection
from disagg_core.drafts.registry import method_of
from disagg_core.drafts.vocab import VocabMap
from disagg_core.errors import BadInput, IncompatibleDraft, TargetError
from disagg_core.run_spec.document import RunSpec
from tests.unit.drafts.dflash.cases import CAPTURE, VOCAB, small_config, small_draft, some_facts, target_parts

pytestmark = pytest.mark.unit

OPTIONS = {"mask_token_id": VOCAB - 1}


def test_the_registry_knows_it() -> None:
    assert method_of("dflash") is METHOD


def test_a_run_document_has_the_published_defaults() -> None:
    spec = RunSpec.model_validate({"target": {"model": "x"}, "draft": {"method": "dflash"}, "data": {"prompts": "p"}})
    draft = spec.draft
    assert isinstance(draft, DFlashSection)
    assert (draft.block_size, draft.num_layers, draft.anchors, draft.noise) == (16, 5, 512, 0.0)
    assert (draft.loss.type, draft.loss.label, draft.loss.divides_by) == ("dflash", "data", "weights")


@pytest.mark.parametrize(
    ("layers", "count", "expected"),
    [
        (36, 5, (1, 9, 17, 25, 33)),
        (64, 5, (1, 16, 31, 46, 61)),
        (28, 1, (14,)),
        (6, 5, (0, 1, 2, 3, 4)),
        (4, 5, (0, 1, 2)),
        (2, 1, (0,)),
    ],
)
def test_default_layers(layers: int, count: int, expected: tuple[int, ...]) -> None:
    assert default_layers(layers, count) == expected


def test_captured_are_the_layers_and_for_the_teacher_the_last_state() -> None:
    assert METHOD.capture(DFlashSection(), 36, None) == CAPTURE
    teacher = DFlashSection(loss={"label": "teacher"})
    assert METHOD.capture(teacher, 36, (3, 4)) == Capture((3, 4), last_hidden_state=True)


@pytest.mark.parametrize("layers", [(3, 3), (5, 4), (-1, 4), (2, 35), ()])
def test_layers_that_the_target_cannot_give_are_named(layers: tuple[int, ...]) -> None:
    with pytest.raises(TargetError, match=r"ascending layer ids from 0 to 34 .*found \["):
        METHOD.capture(DFlashSection(), 36, layers)


def test_a_target_of_one_layer_is_refused() -> None:
    with pytest.raises(TargetError, match="at least 2 decoder layers"):
        METHOD.check(DFlashSection(**OPTIONS), some_facts(num_layers=1), max_tokens=64, draft_tokens=5)


def test_a_draft_sees_the_embedding_that_it_is_served_with() -> None:
    """The target's times a factor: the engine's, unless the document or a published file says another."""
    target = some_facts(embedding_scale=4.0)
    served = METHOD.config_for(DFlashSection(**OPTIONS), target, CAPTURE, VOCAB)
    chosen = METHOD.config_for(DFlashSection(**OPTIONS, embedding_scale=1.0), target, CAPTURE, VOCAB)
    published = served.model_copy(update={"input_embedding_scale": None})
    assert served.to_dict()["dflash_config"]["input_embedding_scale"] == 4.0, "vLLM reads it for DFlash2"
    assert DFlashConfig.from_dict(chosen.to_dict()) == chosen
    usual = METHOD.config_for(DFlashSection(**OPTIONS), some_facts(), CAPTURE, VOCAB)
    assert "input_embedding_scale" not in usual.to_dict()["dflash_config"]

    parts = replace(target_parts(served), embedding_scale=4.0)
    for config, factor in ((served, 4.0), (chosen, 1.0), (published, 4.0)):
        draft = METHOD.model(config)
        draft.attach(parts)
        torch.testing.assert_close(draft.embed(torch.tensor([3, 5])), factor * parts.embedding[[3, 5]].float())


def test_a_published_draft_that_is_trained_on_says_the_factor_it_is_trained_with() -> None:
    target = some_facts(embedding_scale=4.0)
    served = METHOD.config_for(DFlashSection(**OPTIONS), target, CAPTURE, VOCAB)
    published = METHOD.model(served.model_copy(update={"input_embedding_scale": None}))
    weights, vocabulary = published.serving_state_dict(), VocabMap.identity(VOCAB)
    for config, scale in ((published.config, 4.0), (served.model_copy(update={"input_embedding_scale": 1.0}), 1.0)):
        continued = METHOD.continued(config, weights, target, CAPTURE, vocabulary)
        assert continued.config.input_embedding_scale == continued.embedding_scale == scale


def test_a_target_that_sglang_cannot_capture_for_such_drafts_is_named() -> None:
    assert METHOD.unserved(some_facts()) is None
    said = METHOD.unserved(some_facts(model_type="gemma3_text"))
    assert said == "SGLang 0.5.23 cannot serve a DFlash draft for a gemma3_text target"


def test_what_fits_passes() -> None:
    METHOD.check(DFlashSection(**OPTIONS), some_facts(), max_tokens=16, draft_tokens=15)
    METHOD.check(DFlashSection(init_from="./draft"), some_facts(), max_tokens=8, draft_tokens=5)


@pytest.mark.parametrize(
    ("options", "facts", "words"),
    [
        ({"block_size": 33}, {}, r"draft.block_size: expected at most data.max_tokens \(32\), found 33"),
        ({"block_size": 5}, {}, r"evaluation.draft_tokens: expected at most draft.block_size - 1 \(4\), found 7"),
        ({"mask_token_id": VOCAB}, {}, r"draft.mask_token_id: expected an id below .* 40, found 40"),
        ({"mask_token_id": 1}, {}, "draft.mask_token_id: .* found 1, with which the target begins, ends or pads"),
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, {}, "num_attention_heads 4 is no multiple of .* 3"),
        ({"head_dim": 7}, {}, "head_dim: expected an even number, found 7"),
    ],
)
def test_what_cannot_work_is_named(options: dict[str, Any], facts: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        METHOD.check(DFlashSection(**{**OPTIONS, **options}), some_facts(**facts), max_tokens=32, draft_tokens=7)


def test_every_fault_is_named_at_once() -> None:
    section = DFlashSection(block_size=20, mask_token_id=90, head_dim=7)
    with pytest.raises(BadInput) as caught:
        METHOD.check(section, some_facts(), max_tokens=16, draft_tokens=30)
    for word in ("draft.block_size", "evaluation.draft_tokens", "draft.mask_token_id", "head_dim"):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"layer_types": "sliding"}, "sliding_window: expected at least block_size"),
        ({"layer_types": "sliding", "sliding_window": 15}, "found 15"),
        ({"layer_types": ["full", "sliding"], "sliding_window": 64}, r"expected 5 \(num_layers\), found 2"),
        ({"sliding_window": 64}, "all layers are full"),
        ({"init_from": "./x", "block_size": 8, "head_dim": 4}, "block_size, head_dim"),
        ({"loss": {"type": "dpace", "gamma": 7.0}}, "gamma takes effect with type: dflash only"),
        ({"loss": {"type": "dpace", "normalisation": "weights"}}, "expected normalisation positions or sequences"),
        ({"block_size": 1}, "block_size"),
        ({"hidden_size": 12}, "hidden_size"),
    ],
)
def test_options_that_cannot_take_effect_are_refused(section: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        DFlashSection(**section)


def test_a_draft_of_the_target_is_built_like_it() -> None:
    section = DFlashSection(**OPTIONS, layer_types=["full", "sliding"], num_layers=2, sliding_window=64, head_dim=8)
    config = METHOD.config_for(section, some_facts(), Capture((1, 9), False), VOCAB)

    assert config.layer_types == ("full_attention", "sliding_attention")
    assert (config.head_dim, config.hidden_size, config.sliding_window, config.layers) == (8, 16, 64, (1, 9))
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 1e6}
    own = DFlashSection(**OPTIONS, rope_theta=5e5)
    mrope = some_facts(rope_parameters={"rope_type": "default", "rope_theta": 1e7, "mrope_section": [1, 1, 1]})
    assert METHOD.config_for(own, mrope, CAPTURE, VOCAB).rope_parameters["rope_theta"] == 5e5
    assert METHOD.config_for(DFlashSection(**OPTIONS), mrope, CAPTURE, VOCAB).rope_parameters["rope_theta"] == 1e7
    draft = METHOD.model(config)
    trained = sum(p.numel() for p in draft.parameters())
    assert METHOD.parameters(config) == trained
    assert METHOD.most_draft_tokens(config) == 15
    with pytest.raises(IncompatibleDraft, match="whole vocabulary"):
        METHOD.config_for(section, some_facts(), CAPTURE, 30)


def test_a_published_draft_goes_on_for_its_own_target_only() -> None:
    draft = small_draft()
    state, vocab = draft.serving_state_dict(), VocabMap.identity(VOCAB)
    facts, capture = some_facts(num_layers=6), Capture((1, 3), False)

    again = METHOD.continued(draft.config, state, facts, capture, vocab)
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.serving_state_dict().items())
    for other, layers, word in (
        (some_facts(num_layers=6, hidden_size=32), (1, 3), "hidden_size: expected 32, found 16"),
        (some_facts(num_layers=6, vocab_size=50), (1, 3), "vocab_size: expected 50, found 40"),
        (facts, (0, 3), "target_layer_ids"),
        (some_facts(num_layers=7), (1, 3), "num_target_layers"),
    ):
        with pytest.raises(IncompatibleDraft, match=word):
            METHOD.continued(draft.config, state, other, Capture(layers, False), vocab)


def test_a_draft_without_the_targets_parts_refuses_to_compute() -> None:
    draft = METHOD.model(small_config())
    with pytest.raises(IncompatibleDraft, match=r"call attach\(\) first"):
        draft.embed(torch.tensor([1]))
    with pytest.raises(IncompatibleDraft, match=r"call attach\(\) first"):
        draft.logits(torch.zeros(1, 16))
    with pytest.raises(IncompatibleDraft, match=r"embedding: expected .*\(40, 16\), found \(30, 16\)"):
        draft.attach(target_parts(small_config(vocab_size=30, mask_token_id=3)))
    with pytest.raises(IncompatibleDraft, match="vocabulary map"):
        draft.attach(target_parts(small_config()), VocabMap.from_counts(torch.arange(VOCAB), 30))


def test_a_state_that_does_not_fit_is_named_tensor_by_tensor() -> None:
    draft = small_draft()
    state = draft.serving_state_dict()
    assert not any(name.startswith(("embed", "lm_head")) for name in state)
    broken = {**state, "extra": torch.zeros(1), "norm.weight": torch.zeros(3)}
    del broken["fc.weight"]
    with pytest.raises(IncompatibleDraft, match=r"missing fc.weight; unknown extra; norm.weight: expected \[16\]"):
        draft.load_serving_state_dict(broken)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"attention_bias": True}, "attention_bias: expected False, found True"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"dflash_config": {"projector_type": "domino"}}, "projector_type"),
        ({"dflash_config": {"conv_kernel_size": 2}}, "conv_kernel_size: unknown to a DFlashDraftModel"),
        ({"dflash_config": {"attention_sink_bias": True}}, "attention_sink_bias"),
        ({"sample_from_anchor": True}, "sample_from_anchor"),
        ({"mask_token_id": 40}, "outside the vocabulary of 40"),
        ({"target_layer_ids": [1, 5]}, "ascending ids from 0 to 4"),
        ({"layer_types": ["sliding_attention"] * 2, "sliding_window": 3}, "at least block_size 4"),
        ({"mask_token_id": None}, "no mask_token_id"),
    ],
)
def test_a_config_that_computes_something_else_is_refused(change: dict[str, Any], words: str) -> None:
    document = small_config().to_dict()
    del document["dflash_config"]
    with pytest.raises(IncompatibleDraft, match=words):
        DFlashConfig.from_dict({**document, "target_layer_ids": [1, 3], "mask_token_id": 39, **change})
