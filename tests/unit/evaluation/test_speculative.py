"""Speculative decoding gives exactly what the target alone would give, however good or bad the draft is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM, MistralConfig, Qwen3Config, Qwen3NextConfig

from disagg_core.drafts.eagle3.drafter import DraftChain
from disagg_core.drafts.sampling import Sampler
from disagg_core.errors import BadInput, TargetError
from disagg_core.evaluation import generate_all, speculative_generate
from disagg_core.evaluation.target_runner import TargetRunner
from tests.unit.evaluation.models import VOCAB, BlockDraft, OracleDraft, greedy, make_draft

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("draft_tokens", [1, 2, 5, 7])
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_the_output_is_the_targets_own_greedy_continuation(
    target: LlamaForCausalLM,
    oracle: OracleDraft,
    prompts: list[list[int]],
    continuations: list[list[int]],
    draft_tokens: int,
    batch_size: int,
) -> None:
    generations = generate_all(
        target, oracle, prompts, draft_tokens=draft_tokens, max_new_tokens=40, batch_size=batch_size
    )

    assert [generation.tokens for generation in generations] == [tokens[:40] for tokens in continuations]
    kept = {count for generation in generations for count in generation.accepted}
    assert kept == set(range(draft_tokens + 1)), "every number of kept tokens was met"
    for generation in generations:
        assert 40 <= 1 + sum(generation.accepted) + generation.target_passes <= 40 + draft_tokens


def test_a_draft_that_never_misses_yields_k_plus_one_tokens_a_pass(
    target: LlamaForCausalLM, prompts: list[list[int]], continuations: list[list[int]]
) -> None:
    prompt, continuation = prompts[3], continuations[3]
    oracle = OracleDraft(make_draft(target), [[*prompt, *continuation]], misses=0.0)

    generation = speculative_generate(target, oracle, torch.tensor([prompt]), draft_tokens=4, max_new_tokens=41)

    assert generation.tokens == continuation[:41]
    assert generation.accepted == [4] * 8
    assert generation.accept_length == 5.0


@pytest.mark.parametrize(
    "changes",
    [{"draft_vocab": 24}, {"fc_norm": True}, {"hidden_size": 48, "target_hidden_size": 32, "head_dim": 16}],
    ids=["small vocabulary", "normed thirds", "another width"],
)
def test_every_kind_of_draft_is_lossless(
    target: LlamaForCausalLM, prompts: list[list[int]], continuations: list[list[int]], changes: dict[str, Any]
) -> None:
    known = [[*a, *b] for a, b in zip(prompts, continuations, strict=True)]
    oracle = OracleDraft(make_draft(target, **changes), known)

    generations = generate_all(target, oracle, prompts, max_new_tokens=24)

    assert [generation.tokens for generation in generations] == [tokens[:24] for tokens in continuations]
    assert sum(sum(generation.accepted) for generation in generations) > 0


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("draft_tokens", [1, 5])
def test_a_method_that_drafts_blocks_from_candidates_of_each_slot_is_lossless(
    target: LlamaForCausalLM, prompts: list[list[int]], continuations: list[list[int]], draft_tokens: int
) -> None:
    """Rows propose unlike numbers of tokens; two layers are captured instead of three."""
    draft = BlockDraft(VOCAB, [[*a, *b] for a, b in zip(prompts, continuations, strict=True)])

    generations = generate_all(target, draft, prompts, draft_tokens=draft_tokens, max_new_tokens=40, batch_size=3)

    assert [generation.tokens for generation in generations] == [tokens[:40] for tokens in continuations]
    kept = {count for generation in generations for count in generation.accepted}
    assert kept == set(range(draft_tokens + 1))


@pytest.mark.usefixtures("blocks")
def test_more_tokens_than_a_draft_can_propose_at_once_are_refused(target: LlamaForCausalLM) -> None:
    with pytest.raises(BadInput, match="at most 5, which is what this Block draft proposes at once, found 6"):
        speculative_generate(target, BlockDraft(VOCAB), [1, 2], draft_tokens=6)


def test_a_draft_whose_files_name_no_layers_reads_its_methods_own_choice(
    target: LlamaForCausalLM, prompts: list[list[int]]
) -> None:
    """Of four layers EAGLE-3 captures the first three."""
    silent = make_draft(target, aux_layer_ids=None, initializer_range=0.4)
    told = make_draft(target, aux_layer_ids=(0, 1, 2), initializer_range=0.4)

    found = generate_all(target, silent, prompts, max_new_tokens=24)

    assert silent.config.layers is None
    assert found == generate_all(target, told, prompts, max_new_tokens=24)


def test_layers_that_the_target_lacks_are_refused(target: LlamaForCausalLM) -> None:
    with pytest.raises(TargetError, match=r"expected layers from 0 to 3 to capture, found \[4\]"):
        speculative_generate(target, make_draft(target, aux_layer_ids=(0, 1, 4)), [1, 2])


@pytest.mark.parametrize(
    "config",
    [
        MistralConfig(sliding_window=8, hidden_size=32, intermediate_size=64, num_hidden_layers=4, vocab_size=VOCAB),
        Qwen3Config(hidden_size=32, intermediate_size=64, num_hidden_layers=4, head_dim=8, vocab_size=VOCAB),
    ],
    ids=["sliding window", "qwen3"],
)
def test_other_targets(config: Any, prompts: list[list[int]]) -> None:
    """Far beyond the window of 8, where a hole in the cache would push a token out of sight."""
    config.num_attention_heads = config.num_key_value_heads = 4
    torch.manual_seed(0)
    target = AutoModelForCausalLM.from_config(config).eval()
    for parameter in target.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.4)
    continuations = [greedy(target, prompt, 24) for prompt in prompts]
    oracle = OracleDraft(make_draft(target), [[*a, *b] for a, b in zip(prompts, continuations, strict=True)])

    generations = generate_all(target, oracle, prompts, max_new_tokens=24)

    assert [generation.tokens for generation in generations] == continuations


def test_decoding_ends_with_an_end_of_sequence_token(
    target: LlamaForCausalLM, oracle: OracleDraft, prompts: list[list[int]], continuations: list[list[int]]
) -> None:
    ends = {continuations[0][7], continuations[3][11]}
    expected = []
    for tokens in continuations:
        end = next((place for place, token in enumerate(tokens) if token in ends), len(tokens) - 1)
        expected.append(tokens[: end + 1])
    assert len({len(tokens) for tokens in expected}) > 2, "the prompts end at unlike lengths"

    with_draft = generate_all(target, oracle, prompts, max_new_tokens=48, eos_token_ids=ends)
    alone = generate_all(target, None, prompts, max_new_tokens=48, eos_token_ids=ends)

    assert [generation.tokens for generation in with_draft] == expected
    assert [generation.tokens for generation in alone] == expected
    for generation in with_draft:  # the last pass counts whole, as servers count it
        assert 1 + sum(generation.accepted) + generation.target_passes >= len(generation.tokens)
        assert 1 + sum(generation.accepted[:-1]) + generation.target_passes - 1 < len(generation.tokens)


def test_one_new_token_needs_no_pass(target: LlamaForCausalLM, oracle: OracleDraft, prompts: list[list[int]]) -> None:
    generation = speculative_generate(target, oracle, prompts[0], max_new_tokens=1)

    assert len(generation.tokens) == 1
    assert (generation.target_passes, generation.accept_length) == (0, 1.0)


@torch.inference_mode()
def test_chains_drafted_from_the_cache_are_those_of_a_fresh_draft(
    target: LlamaForCausalLM, prompts: list[list[int]]
) -> None:
    """After passes that kept 0, 2 and 4 tokens, every row drafts as if its whole text were a prompt."""
    draft = make_draft(target, initializer_range=0.4)
    sampler = Sampler(0.0)
    runner = TargetRunner(target, draft.config.layers or ())
    texts = [list(prompt) for prompt in prompts[2:5]]
    step = runner.prefill(texts)
    pending, _ = sampler.pick(step.logits[:, -1])
    chain = DraftChain(draft, sampler, texts, step.states, pending)
    for counts in ([0, 2, 4], [4, 0, 1], [1, 1, 0]):
        accepted = torch.tensor(counts)
        drafted = chain.propose(4, runner.lengths)
        own = torch.tensor([7, 8, 9])
        step = runner.extend(torch.cat((pending[:, None], drafted.ids), dim=1))
        chain.follow(step.states, drafted, accepted, own, runner.lengths)
        runner.keep(accepted + 1, of=5)
        for text, first, ids, count in zip(texts, pending.tolist(), drafted.ids.tolist(), counts, strict=True):
            text.extend([first, *ids[:count]])
        pending = own

        found = chain.propose(5, runner.lengths)

        for row, text in enumerate(texts):
            alone = TargetRunner(target, draft.config.layers or ())
            fresh = DraftChain(draft, sampler, [text], alone.prefill([text]).states, own[row : row + 1])
            torch.testing.assert_close(found.ids[row], fresh.propose(5, alone.lengths).ids[0])
            alone.close()
    runner.close()


def test_the_target_is_left_as_it_was(
    target: LlamaForCausalLM, oracle: OracleDraft, prompts: list[list[int]], continuations: list[list[int]]
) -> None:
    speculative_generate(target, oracle, prompts[1], max_new_tokens=4)
    with pytest.raises(BadInput):
        speculative_generate(target, oracle, [], max_new_tokens=4)

    assert not any(layer._forward_hooks for layer in target.model.layers)
    assert greedy(target, prompts[1], 48) == continuations[1]


@pytest.mark.parametrize("setting", [{"draft_tokens": 0}, {"max_new_tokens": 0}, {"temperature": -1.0}])
def test_settings_below_their_range_are_refused(
    target: LlamaForCausalLM, oracle: OracleDraft, setting: dict[str, Any]
) -> None:
    with pytest.raises(BadInput, match="expected"):
        speculative_generate(target, oracle, [1, 2], **setting)


def test_a_target_with_a_recurrent_state_gives_its_own_tokens_though_its_cache_cannot_go_back() -> None:
    torch.manual_seed(0)
    config = Qwen3NextConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        layer_types=["linear_attention", "full_attention"] * 2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    )
    target = AutoModelForCausalLM.from_config(config).eval()
    prompts = [[1, 2, 3, 4], [5, 6]]

    plain = generate_all(target, None, prompts, max_new_tokens=8)
    drafted = generate_all(target, make_draft(target), prompts, draft_tokens=3, max_new_tokens=8)

    for generation, other, prompt in zip(drafted, plain, prompts, strict=True):
        ids = list(prompt)
        with torch.inference_mode():
            for _ in range(8):
                ids.append(int(target(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        assert generation.tokens == other.tokens == ids[len(prompt) :]
        assert generation.accept_length >= 1
