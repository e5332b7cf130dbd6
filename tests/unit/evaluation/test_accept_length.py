"""The accept length is counted as defined, its interval covers the truth, and a wrong token is never lossless."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from disagg_core.errors import BadInput, EvaluationFailed
from disagg_core.evaluation import measure_accept_length
from disagg_core.evaluation.accept_length import bootstrap_interval, summarise
from tests.unit.evaluation.models import OracleDraft, make_target

pytestmark = pytest.mark.unit


def test_the_figures_of_a_measurement_agree_with_each_other(
    target: LlamaForCausalLM, oracle: OracleDraft, prompts: list[list[int]]
) -> None:
    seen: list[tuple[int, int]] = []

    result = measure_accept_length(
        target, oracle, prompts, draft_tokens=4, max_new_tokens=32, batch_size=3, progress=lambda *at: seen.append(at)
    )

    assert result.lossless is True
    assert result.divergences == []
    assert result.accept_length == pytest.approx(result.tokens / result.target_passes)
    assert result.accept_length == pytest.approx(1 + sum(result.per_position))
    assert sorted(result.per_position, reverse=True) == result.per_position
    assert result.interval[0] < result.accept_length < result.interval[1]
    assert 1.5 < result.accept_length < 4.5
    assert result.tokens >= 31 * len(prompts)
    assert seen == [(done, 16) for done in (3, 6, 9, 12, 14, 16)], "the draft and plain decoding take turns"
    assert json.loads(json.dumps(result.to_dict()))["interval"] == list(result.interval)


def test_figures_by_hand() -> None:
    result = summarise([[2, 0, 1], [2]], draft_tokens=3, seconds=1.0)

    assert (result.tokens, result.target_passes, result.prompts) == (9, 4, 2)
    assert result.accept_length == 2.25
    assert result.per_position == [0.75, 0.5, 0.0]
    assert result.lossless is None


def test_the_interval_covers_the_true_length_about_as_often_as_it_says() -> None:
    """Prompts differ in how well they are drafted, which an interval over single passes would overlook."""
    random = np.random.default_rng(0)
    truth, hits = 1.0 + 5 * 0.4, 0
    for _ in range(200):
        rates = random.beta(2, 3, size=24)  # mean 0.4
        hits += truth == np.clip(truth, *bootstrap_interval([random.binomial(5, r, 20).tolist() for r in rates]))

    assert 0.88 <= hits / 200 <= 0.99


class WrongInVerification(LlamaForCausalLM):
    """A target that says something else when it is asked about several tokens at once."""

    def forward(self, input_ids: torch.Tensor, past_key_values: Any = None, **kwargs: Any) -> CausalLMOutputWithPast:
        again = past_key_values is not None and past_key_values.get_seq_length() > 0
        output = super().forward(input_ids, past_key_values=past_key_values, **kwargs)
        if again and input_ids.shape[1] > 1:
            output.logits = output.logits.roll(1, dims=-1)
        return output


def test_a_wrong_token_is_not_lossless(
    target: LlamaForCausalLM, oracle: OracleDraft, prompts: list[list[int]], continuations: list[list[int]]
) -> None:
    broken = WrongInVerification(target.config).eval()
    broken.load_state_dict(target.state_dict())

    result = measure_accept_length(broken, oracle, prompts[:2], max_new_tokens=8)

    assert result.lossless is False
    parting = result.divergences[0]
    assert (parting.prompt, parting.position) == (0, 1)
    assert parting.plain == continuations[0][1]
    assert parting.margin > 0
    assert not parting.tie


class Undecided(LlamaForCausalLM):
    """A target with two tokens of equal logits, which takes the other one when asked about several tokens."""

    def forward(self, input_ids: torch.Tensor, past_key_values: Any = None, **kwargs: Any) -> CausalLMOutputWithPast:
        again = past_key_values is not None and past_key_values.get_seq_length() > 0
        output = super().forward(input_ids, past_key_values=past_key_values, **kwargs)
        output.logits[..., 5] = output.logits[..., 6] = output.logits.amax(-1) + 1
        if again and input_ids.shape[1] > 1:
            output.logits[..., 6] += 1e-6 * output.logits[..., 6].abs()
        return output


def test_a_tie_within_rounding_is_told_from_an_error(target: LlamaForCausalLM, oracle: OracleDraft) -> None:
    undecided = Undecided(target.config).eval()
    undecided.load_state_dict(target.state_dict())

    result = measure_accept_length(undecided, oracle, [[1, 2, 3]], max_new_tokens=8)

    assert result.lossless is True
    assert [(d.plain, d.speculative, d.tie) for d in result.divergences] == [(5, 6, True)]


def test_comparing_can_be_left_out(target: LlamaForCausalLM, oracle: OracleDraft, prompts: list[list[int]]) -> None:
    result = measure_accept_length(target, oracle, prompts, max_new_tokens=8, compare_with_plain=False)

    assert (result.lossless, result.plain_seconds) == (None, None)


def test_nothing_to_measure(target: LlamaForCausalLM, oracle: OracleDraft, continuations: list[list[int]]) -> None:
    with pytest.raises(BadInput, match="at least one prompt and max_new_tokens of at least 2"):
        measure_accept_length(target, oracle, [])
    with pytest.raises(BadInput, match="found 1 prompts and 1"):
        measure_accept_length(target, oracle, [[1]], max_new_tokens=1)
    everything = range(make_target().config.vocab_size)
    with pytest.raises(EvaluationFailed, match="all 1 prompts ended with their first token"):
        measure_accept_length(target, oracle, [[1]], eos_token_ids=everything)
