"""The published defaults, what of a document is refused before a GPU is held, and how a draft is continued."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from disagg_core.drafts.method import FrozenParts
from disagg_core.drafts.p_eagle.method import METHOD
from disagg_core.drafts.p_eagle.options import PEagleSection
from disagg_core.drafts.vocab import VocabMap
from disagg_core.errors import BadInput, IncompatibleDraft
from tests.contract.drafts.kit import HIDDEN, VOCAB, Case, tiny_facts

pytestmark = pytest.mark.unit


def test_the_defaults_are_the_published_ones() -> None:
    options = PEagleSection()

    assert (options.depths, options.retention, options.least_retention, options.num_layers) == (8, 0.8, 0.2, 4)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"mask_token_id": 64}, "draft.mask_token_id: expected an id below .* 64, found 64"),
        ({"mask_token_id": 2}, "draft.mask_token_id: .*begins, ends or pads"),
        ({"mask_token_id": None}, "draft.mask_token_id: expected an id"),
        ({"depths": 32}, "draft.depths: expected at most 30 .*found 32"),
        ({"depths": 2}, "evaluation.draft_tokens: expected at most 2.*found 3"),
        ({"vocab_size": 65}, "draft.vocab_size: expected at most the target's 64, found 65"),
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, "no multiple"),
    ],
)
def test_options_that_do_not_fit_are_named(changes: dict[str, Any], named: str) -> None:
    options = PEagleSection.model_validate({"mask_token_id": 63, "depths": 4} | changes)
    with pytest.raises(BadInput, match=named):
        METHOD.check(options, tiny_facts(), max_tokens=32, draft_tokens=3)


def test_a_window_that_a_chain_does_not_fit_into_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"sliding_window: expected more than depths \(8\), found 8"):
        PEagleSection(sliding_window=8)


def test_a_draft_to_continue_brings_its_own_sizes() -> None:
    with pytest.raises(ValidationError, match=r"expected no sizes beside init_from.*num_layers"):
        PEagleSection(init_from="./draft", num_layers=2)
    METHOD.check(PEagleSection(init_from="./draft"), tiny_facts(), max_tokens=32, draft_tokens=3)


def test_a_fresh_draft_starts_from_a_copy_of_the_target_s_embedding() -> None:
    case = Case.of("p_eagle")
    draft = case.bare_draft()

    draft.attach(case.parts, case.vocab_map)

    weight = dict(draft.named_parameters())["embed_tokens.weight"]
    assert weight.requires_grad
    assert torch.equal(weight, case.parts.embedding)
    assert weight.data_ptr() != case.parts.embedding.data_ptr()


def test_a_trained_embedding_is_kept() -> None:
    case = Case.of("p_eagle")
    trained = case.draft().serving_state_dict()
    draft = case.bare_draft()
    draft.load_serving_state_dict(trained)

    draft.attach(case.parts, case.vocab_map)

    assert torch.equal(draft.serving_state_dict()["embed_tokens.weight"], trained["embed_tokens.weight"])


def test_parts_of_another_target_are_refused() -> None:
    case = Case.of("p_eagle")
    with pytest.raises(IncompatibleDraft, match="embedding: expected"):
        case.bare_draft().attach(FrozenParts(*torch.zeros(2, VOCAB, HIDDEN + 1)))
    with pytest.raises(IncompatibleDraft, match="vocabulary map: expected"):
        case.bare_draft().attach(case.parts, VocabMap.identity(VOCAB))


def test_with_another_vocabulary_the_lm_head_s_rows_follow_their_tokens() -> None:
    case = Case.of("p_eagle")
    state = {name: tensor.detach().clone() for name, tensor in case.draft().serving_state_dict().items()}
    other = VocabMap.from_counts(torch.arange(VOCAB) % 5, 30)

    continued = METHOD.continued(case.config, state, case.facts, case.capture, other)

    head = continued.serving_state_dict()["lm_head.weight"]
    old = case.vocab_map.target_ids.tolist()
    kept = [(row, old.index(token)) for row, token in enumerate(other.target_ids.tolist()) if token in old]
    assert kept
    for row, before in kept:
        assert torch.equal(head[row], state["lm_head.weight"][before])
