"""DSpark drafts on disk: DeepSpec's format, the places where others put its keys, and the speculators library's."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from disagg_core.drafts.dspark.config import DSparkConfig
from disagg_core.drafts.dspark.method import METHOD
from disagg_core.drafts.method import ExportRequest, FrozenParts
from disagg_core.errors import IncompatibleDraft
from tests.unit.drafts.dspark.cases import HEADS, HIDDEN, VOCAB, small_document, small_draft

pytestmark = pytest.mark.unit
OWN = {"block_size", "mask_token_id", "target_layer_ids", "num_target_layers", "markov_rank", "markov_head_type"}


def exported(format: str, **changes: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    draft = small_draft(**changes)
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in draft.serving_state_dict().items()}
    parts = FrozenParts(torch.ones(VOCAB, HIDDEN), torch.ones(VOCAB, HIDDEN))
    request = ExportRequest(format, "bfloat16", 4, "the/target", ("Qwen3ForCausalLM",))
    document, written = METHOD.written(draft.config, tensors, request, parts)
    return json.loads(json.dumps(document)), written


@pytest.mark.parametrize("format", ["sglang", "speculators"])
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_every_head_reads_back_bitwise(head: dict[str, Any], format: str) -> None:
    draft = small_draft(**head)

    document, tensors = exported(format, **head)
    config, state = METHOD.read(document, tensors, format)

    own = {"num_anchors", "num_target_layers"}  # a speculators config does not say them
    assert config.model_dump(exclude=own) == draft.config.model_dump(exclude=own)
    for name, tensor in draft.serving_state_dict().items():
        assert torch.equal(state[name], tensor.to(torch.bfloat16).float()), name


def test_the_engines_config_has_the_drafts_keys_at_the_top() -> None:
    document, tensors = exported("sglang", markov_head_type="gated")

    assert document["architectures"] == ["Qwen3DSparkModel"]
    assert set(document) > OWN
    assert "dflash_config" not in document
    assert document["enable_confidence_head"] is True
    assert set(document["layer_types"]) == {"full_attention"}
    assert {name for name in tensors if "head" in name} == {
        "markov_head.markov_w1.weight",
        "markov_head.markov_w2.weight",
        "markov_head.gate_proj.weight",
        "markov_head.gate_proj.bias",
        "confidence_head.proj.weight",
        "confidence_head.proj.bias",
    }


def test_a_speculators_config_says_that_slot_0_proposes() -> None:
    document, tensors = exported("speculators")

    assert document["architectures"] == ["DSparkSpeculator"]
    assert document["speculators_model_type"] == document["speculators_config"]["algorithm"] == "dspark"
    assert document["sample_from_anchor"] is True
    assert document["aux_hidden_state_layer_ids"] == [2, 4]
    assert document["markov_rank"] == 5
    assert not OWN & set(document["transformer_layer_config"])
    assert {"embed_tokens.weight", "lm_head.weight"} <= set(tensors)


@pytest.mark.parametrize("place", ["dflash_config", "dspark_config", "prefix"])
def test_the_drafts_keys_may_stand_elsewhere(place: str) -> None:
    document = small_document(architectures=["DSparkDraftModel"], markov_head_type="rnn")
    own = {key: document.pop(key) for key in OWN if key in document}
    if place == "prefix":
        document |= {f"dspark_{key}": value for key, value in own.items()}
    else:
        document[place] = {**own, "projector_type": "dspark"}

    assert METHOD.recognises(document)
    assert DSparkConfig.from_dict(document) == DSparkConfig.from_dict(small_document(markov_head_type="rnn"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sample_from_anchor": False}, "sample_from_anchor: expected True, found False"),
        ({"markov_rank": None}, "no markov_rank"),
        ({"markov_head_type": "gru"}, "markov_head_type"),
        ({"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}, "layer_types.*full_attention"),
        ({"is_causal": True}, "is_causal: expected False, found True"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"mask_token_id": VOCAB}, "mask_token_id"),
        ({"target_layer_ids": [3, 5]}, "target_layer_ids"),
        ({"selector_rank": 8}, "selector_rank"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_computes_something_else_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(IncompatibleDraft, match=said):
        METHOD.read(small_document(**change), {}, "draft")


def test_tensors_that_do_not_fit_are_all_named() -> None:
    document, tensors = exported("sglang")
    del tensors["confidence_head.proj.bias"]
    tensors["markov_head.markov_w1.weight"] = torch.zeros(VOCAB, 7)
    tensors["markov_head.gate_proj.bias"] = torch.zeros(5)

    with pytest.raises(IncompatibleDraft) as raised:
        METHOD.read(document, tensors, "draft")

    for name in ("confidence_head.proj.bias", "markov_head.markov_w1.weight", "markov_head.gate_proj.bias"):
        assert name in str(raised.value)
