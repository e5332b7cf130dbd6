"""Decoding with blocks gives what the target alone would give, and each block is that of a fresh draft."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from disagg_core.drafts.dflash import BlockDrafter, DFlashDraft
from disagg_core.drafts.method import FrozenParts
from disagg_core.drafts.sampling import Sampler
from disagg_core.errors import BadInput
from disagg_core.evaluation import generate_all, speculative_generate
from disagg_core.evaluation.target_runner import TargetRunner
from tests.unit.drafts.dflash.cases import CAPPED, KINDS, filled, small_config
from tests.unit.evaluation.models import VOCAB, greedy, make_target

pytestmark = pytest.mark.unit

BLOCK = 6


@pytest.fixture(scope="module")
def target() -> LlamaForCausalLM:
    return make_target()


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, VOCAB - 1, (n,), generator=generator).tolist() for n in (1, 2, 17, 9, 30, 5)]


@pytest.fixture(scope="module")
def continuations(target: LlamaForCausalLM, prompts: list[list[int]]) -> list[list[int]]:
    return [greedy(target, prompt, 30) for prompt in prompts]


def draft_for(target: LlamaForCausalLM, **changes: Any) -> DFlashDraft:
    sizes = {"hidden_size": 32, "vocab_size": VOCAB, "mask_token_id": VOCAB - 1, "target_layer_ids": [0, 2]}
    config = small_config(**{**sizes, "num_target_layers": 4, "block_size": BLOCK, **changes})
    draft = filled(DFlashDraft(config))
    draft.attach(FrozenParts(target.get_input_embeddings().weight, target.lm_head.weight))
    return draft.eval()


class Oracle:
    """Makes a draft's logits those of known texts, with misses: kept and rejected tokens in every mixture."""

    def __init__(self, draft: DFlashDraft, texts: list[list[int]], misses: float) -> None:
        self._random = torch.Generator().manual_seed(0)
        self._texts, self._misses, self._draft = texts, misses, draft
        self._logits = draft.logits

    def watch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from disagg_core.drafts.dflash import drafter

        draft_block = drafter.draft_block

        def watched(draft: DFlashDraft, cache: Any, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            self._first, self._start = ids[:, 0].tolist(), positions[:, 0].tolist()
            return draft_block(draft, cache, ids, positions)

        monkeypatch.setattr(drafter, "draft_block", watched)
        monkeypatch.setattr(self._draft, "logits", self._known)

    def _known(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = self._logits(hidden)
        for row, (first, start) in enumerate(zip(self._first, self._start, strict=True)):
            text = next((t for t in self._texts if start < len(t) and t[start] == first), [])
            for slot, token in enumerate(text[start + 1 : start + 1 + hidden.shape[1]]):
                if torch.rand((), generator=self._random) > self._misses:
                    logits[row, slot, token] += 100.0
        return logits


@pytest.fixture
def oracle(
    target: LlamaForCausalLM,
    prompts: list[list[int]],
    continuations: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> DFlashDraft:
    draft = draft_for(target)
    texts = [[*a, *b] for a, b in zip(prompts, continuations, strict=True)]
    Oracle(draft, texts, misses=0.2).watch(monkeypatch)
    return draft


@pytest.mark.parametrize("draft_tokens", [1, 3, BLOCK - 1])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_output_is_the_targets_own(
    target: LlamaForCausalLM,
    oracle: DFlashDraft,
    prompts: list[list[int]],
    continuations: list[list[int]],
    draft_tokens: int,
    batch_size: int,
) -> None:
    generations = generate_all(
        target, oracle, prompts, draft_tokens=draft_tokens, max_new_tokens=24, batch_size=batch_size
    )

    assert [generation.tokens for generation in generations] == [tokens[:24] for tokens in continuations]
    kept = {count for generation in generations for count in generation.accepted}
    assert kept == set(range(draft_tokens + 1)), "every number of kept tokens was met"


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_every_kind_of_draft_is_lossless(
    target: LlamaForCausalLM, prompts: list[list[int]], continuations: list[list[int]], kind: dict[str, Any]
) -> None:
    window = {"sliding_window": 7} if "sliding_window" in kind else {}
    generations = generate_all(
        target, draft_for(target, **{**kind, **window}), prompts, draft_tokens=BLOCK - 1, max_new_tokens=20
    )
    assert [generation.tokens for generation in generations] == [tokens[:20] for tokens in continuations]


def test_a_block_has_no_more_tokens_than_the_draft_was_made_for(target: LlamaForCausalLM) -> None:
    with pytest.raises(BadInput, match="at most 5, which is what this DFlash draft proposes"):
        generate_all(target, draft_for(target), [[1, 2]], draft_tokens=BLOCK)


@torch.inference_mode()
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_blocks_drafted_from_the_cache_are_those_of_a_fresh_draft(
    target: LlamaForCausalLM, prompts: list[list[int]], kind: dict[str, Any]
) -> None:
    """After passes that kept 0, 2 and 5 tokens, and without one of the rows, every row drafts as if it were new."""
    window = {"sliding_window": 7} if "sliding_window" in kind else {}
    draft = draft_for(target, **{**kind, **window})
    sampler = Sampler(0.0)
    runner = TargetRunner(target, draft.config.target_layer_ids)
    texts = [list(prompt) for prompt in prompts[1:5]]
    step = runner.prefill(texts)
    pending, _ = sampler.pick(step.logits[:, -1])
    drafter = BlockDrafter(draft, sampler, texts, step.states, pending)
    for round_, counts in enumerate(([0, 2, 5, 1], [5, 0, 1], [1, 1, 0])):
        if round_ == 1:
            rows = torch.tensor([0, 1, 3])
            runner.select(rows)
            drafter.select(rows)
            pending, texts = pending[rows], [texts[row] for row in rows]
        drafted = drafter.propose(BLOCK - 1, runner.lengths)
        own = torch.arange(7, 7 + len(counts))
        step = runner.extend(torch.cat((pending[:, None], drafted.ids), dim=1))
        accepted = torch.tensor(counts)
        drafter.follow(step.states, drafted, accepted, own, runner.lengths)
        runner.keep(accepted + 1, of=BLOCK)
        for text, first, ids, count in zip(texts, pending.tolist(), drafted.ids.tolist(), counts, strict=True):
            text.extend([first, *ids[:count]])
        pending = own

        found = drafter.propose(BLOCK - 1, runner.lengths)

        for row, text in enumerate(texts):
            alone = TargetRunner(target, draft.config.target_layer_ids)
            fresh = BlockDrafter(draft, sampler, [text], alone.prefill([text]).states, own[row : row + 1])
            assert torch.equal(found.ids[row], fresh.propose(BLOCK - 1, alone.lengths).ids[0])


def test_sampled_tokens_follow_the_target(target: LlamaForCausalLM) -> None:
    """First tokens of many continuations at temperature 1, against the target's own distribution."""
    prompt = [3, 1, 4, 1, 5]
    draft = draft_for(target, **CAPPED)
    generator = torch.Generator().manual_seed(2)
    pairs = torch.zeros(VOCAB)
    count = 400
    generations = generate_all(
        target,
        draft,
        [prompt] * count,
        draft_tokens=3,
        max_new_tokens=2,
        temperature=1.0,
        generator=generator,
        batch_size=count,
    )
    for generation in generations:
        pairs[generation.tokens[1]] += 1
    with torch.inference_mode():
        first = torch.softmax(target(input_ids=torch.tensor([prompt])).logits[0, -1], -1)
        ids = torch.tensor([[*prompt, token] for token in range(VOCAB)])
        second = torch.softmax(target(input_ids=ids).logits[:, -1], -1)
    expected = first @ second
    assert float((pairs / count - expected).abs().sum() / 2) < 0.2, "total variation within what 400 draws allow"


def test_one_prompt_goes_through_the_short_door(
    target: LlamaForCausalLM, prompts: list[list[int]], continuations: list[list[int]]
) -> None:
    generation = speculative_generate(target, draft_for(target), prompts[2], draft_tokens=2, max_new_tokens=9)
    assert generation.tokens == continuations[2][:9]
