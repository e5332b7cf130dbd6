"""DSpark's section of the run document."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from disagg_core.drafts.dspark.method import METHOD
from disagg_core.drafts.dspark.options import DSparkSection
from disagg_core.errors import BadInput
from tests.contract.drafts.kit import tiny_facts

pytestmark = pytest.mark.unit


def test_defaults_are_the_published_ones() -> None:
    section = DSparkSection()

    assert (section.block_size, section.num_layers, section.anchors, section.markov_rank) == (7, 5, 512, 256)
    assert section.markov_head_type == "vanilla"
    assert section.enable_confidence_head
    assert section.confidence_head_with_markov
    loss = section.loss
    assert (loss.ce, loss.l1, loss.confidence, loss.gamma) == (0.1, 0.9, 1.0, 4.0)
    assert METHOD.capture(section, 36, None).layers == (1, 9, 17, 25, 33)
    assert METHOD.capture(section, 36, None).last_hidden_state


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"loss": {"ce": 0, "l1": 0}}, "ce or l1"),
        ({"loss": {"confidence": 0}}, "enable_confidence_head: false"),
        ({"enable_confidence_head": False, "confidence_threshold": 0.5}, "confidence_threshold"),
        ({"init_from": "./draft", "markov_rank": 8}, "markov_rank"),
        ({"init_from": "./draft", "block_size": 8}, "block_size"),
        ({"layer_types": "sliding", "sliding_window": 64}, "layer_types"),
        ({"markov_head_type": "gru"}, "markov_head_type"),
    ],
    ids=["nothing trained", "untrained head", "no head to cut by", "rank beside draft", "size beside draft", "sliding",
         "unknown head"],
)  # fmt: skip
def test_options_that_do_not_fit_are_named(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        DSparkSection.model_validate(values)


def test_a_block_proposes_as_many_tokens_as_it_has_slots() -> None:
    section = DSparkSection(mask_token_id=63, num_layers=2)

    METHOD.check(section, tiny_facts(), max_tokens=64, draft_tokens=7)
    with pytest.raises(BadInput, match=r"draft_tokens: expected at most draft\.block_size \(7\), found 8"):
        METHOD.check(section, tiny_facts(), max_tokens=64, draft_tokens=8)
    with pytest.raises(BadInput, match=r"block_size: expected at most data\.max_tokens \(6\), found 7"):
        METHOD.check(section, tiny_facts(), max_tokens=6, draft_tokens=3)
    with pytest.raises(BadInput, match=r"mask_token_id.*64"):
        METHOD.check(section.model_copy(update={"mask_token_id": 64}), tiny_facts(), max_tokens=64, draft_tokens=3)
