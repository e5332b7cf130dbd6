"""Decoding with DSpark drafts: the target's own text, whatever the head and however early a proposal is cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from disagg_core.drafts.dspark import DSparkDraft, WalkingDrafter
from disagg_core.drafts.sampling import Sampler
from disagg_core.evaluation import generate_all
from tests.contract.drafts.kit import VOCAB, Case, tiny_target
from tests.unit.drafts.dspark.cases import HIDDEN, small_draft

pytestmark = pytest.mark.unit
PROMPTS = [[5, 9, 11], [7, 3, 8, 20, 31, 6, 40], [VOCAB - 1]]


def tiny_draft(**options: Any) -> DSparkDraft:
    draft = Case.of("dspark", **options).draft()
    assert isinstance(draft, DSparkDraft)
    return draft.eval().requires_grad_(False)


@pytest.mark.parametrize("threshold", [0.0, 0.45, 0.999])
@pytest.mark.parametrize("head", ["vanilla", "gated", "rnn"])
def test_decoding_says_what_the_target_says(head: str, threshold: float) -> None:
    draft = tiny_draft(markov_head_type=head, confidence_threshold=threshold)

    plain = generate_all(tiny_target(), None, PROMPTS, max_new_tokens=20)
    drafted = generate_all(tiny_target(), draft, PROMPTS, draft_tokens=4, max_new_tokens=20)

    assert [generation.tokens for generation in drafted] == [generation.tokens for generation in plain]


def drafter_of(draft: DSparkDraft, temperature: float) -> WalkingDrafter:
    states = torch.randn(2, 5, 2 * HIDDEN, generator=torch.Generator().manual_seed(2))
    sampler = Sampler(temperature, torch.Generator().manual_seed(4))
    return WalkingDrafter(draft, sampler, [[1, 2, 3, 4, 5], [6, 7, 8]], states, torch.tensor([9, 10]))


@torch.no_grad()
def test_sampled_tokens_come_with_what_they_were_drawn_from() -> None:
    lengths = torch.tensor([5, 3])
    greedy = drafter_of(small_draft(), 0.0).propose(4, lengths)
    sampled = drafter_of(small_draft(), 0.7).propose(4, lengths)

    assert greedy.probabilities is None
    assert sampled.probabilities is not None
    torch.testing.assert_close(sampled.probabilities.sum(-1), torch.ones(2, 4))
    assert torch.equal(sampled.probabilities[:, 0].argmax(-1), greedy.ids[:, 0])
    assert bool((sampled.probabilities.gather(2, sampled.picked[:, :, None]) > 0).all())


@torch.no_grad()
def test_a_proposal_ends_before_the_first_doubtful_token() -> None:
    draft = small_draft()
    assert draft.confidence_head is not None
    lengths = torch.tensor([5, 3])
    all_of_them = drafter_of(draft, 0.0).propose(4, lengths)
    assert all_of_them.proposed.tolist() == [4, 4]

    draft.config = draft.config.model_copy(update={"confidence_threshold": 0.5})
    draft.confidence_head.proj.weight.zero_()
    draft.confidence_head.proj.bias.fill_(0.1)
    assert drafter_of(draft, 0.0).propose(4, lengths).proposed.tolist() == [4, 4]
    draft.confidence_head.proj.bias.fill_(-0.1)
    assert drafter_of(draft, 0.0).propose(4, lengths).proposed.tolist() == [0, 0]
    draft.confidence_head.proj.bias.fill_(0.0)
    draft.confidence_head.proj.weight[0, -draft.config.markov_rank :] = -draft.markov_head.markov_w1.weight[
        all_of_them.ids[0, 1]
    ]
    cut = drafter_of(draft, 0.0).propose(4, lengths)
    assert int(cut.proposed[0]) <= 2  # the token before slot 2 makes it doubtful
    assert torch.equal(cut.ids, all_of_them.ids)
