"""At a temperature the output follows the target's own distribution, whatever the draft proposes."""

from __future__ import annotations

from collections import Counter
from itertools import product

import pytest
import torch
from transformers import LlamaForCausalLM

from disagg_core.drafts.method import DraftModel
from disagg_core.drafts.sampling import DraftedTokens, Sampler
from disagg_core.evaluation import generate_all, speculative_generate
from tests.unit.evaluation.models import BlockDraft, make_draft, make_target

pytestmark = pytest.mark.unit

VOCAB, LENGTH, TEMPERATURE, SAMPLES = 7, 3, 0.9, 12_000
PROMPT = [3, 1, 4, 1, 5]


@pytest.fixture(scope="module")
def small() -> LlamaForCausalLM:
    return make_target(VOCAB, context=0.25, seed=3)


@torch.no_grad()
def exact(target: LlamaForCausalLM, temperature: float) -> dict[tuple[int, ...], float]:
    """The target's probability of every continuation of LENGTH tokens."""
    texts = list(product(range(VOCAB), repeat=LENGTH))
    logits = target(torch.tensor([[*PROMPT, *text] for text in texts])).logits
    chances = torch.log_softmax(logits[:, len(PROMPT) - 1 : -1].double() / temperature, dim=-1)
    total = chances.gather(2, torch.tensor(texts)[:, :, None]).sum(dim=(1, 2)).exp()
    return dict(zip(texts, total.tolist(), strict=True))


def sample(target: LlamaForCausalLM, draft: DraftModel | None, seed: int) -> tuple[Counter[tuple[int, ...]], float]:
    """How often each continuation came, and the part of the drafted tokens that was kept."""
    generations = generate_all(
        target,
        draft,
        [PROMPT] * SAMPLES,
        draft_tokens=2,
        max_new_tokens=LENGTH,
        temperature=TEMPERATURE,
        generator=torch.Generator().manual_seed(seed),
        batch_size=2000,
    )
    kept = [count / 2 for generation in generations for count in generation.accepted]
    return Counter(tuple(generation.tokens) for generation in generations), sum(kept) / max(1, len(kept))


def chi_square(found: Counter[tuple[int, ...]], wanted: dict[tuple[int, ...], float]) -> float:
    """Deviation of the counts in standard deviations of chi-square; texts that are expected under 5 times pooled."""
    pooled_found, pooled_wanted, statistic, cells = 0, 0.0, 0.0, -1
    for text, chance in wanted.items():
        if chance * SAMPLES < 5:
            pooled_found, pooled_wanted = pooled_found + found[text], pooled_wanted + chance * SAMPLES
        else:
            statistic += (found[text] - chance * SAMPLES) ** 2 / (chance * SAMPLES)
            cells += 1
    if pooled_wanted > 0:
        statistic += (pooled_found - pooled_wanted) ** 2 / pooled_wanted
        cells += 1
    return (statistic - cells) / (2 * cells) ** 0.5


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize(
    "kind", ["unlike the target", "small vocabulary", "the target's own words", "blocks of candidates", "none"]
)
def test_the_distribution_is_the_targets(small: LlamaForCausalLM, kind: str) -> None:
    drafts = {
        "unlike the target": lambda: make_draft(small, initializer_range=0.4),
        "small vocabulary": lambda: make_draft(small, draft_vocab=3, initializer_range=0.4),
        "the target's own words": lambda: make_draft(small, initializer_range=1e-4),
        "blocks of candidates": lambda: BlockDraft(VOCAB),
        "none": lambda: None,
    }

    found, kept = sample(small, drafts[kind](), seed=11)

    assert chi_square(found, exact(small, TEMPERATURE)) < 4.0
    assert chi_square(found, exact(small, TEMPERATURE * 1.2)) > 15.0, "the test can tell distributions apart"
    assert (0.02 < kept < 0.98) is (kind != "none")


@pytest.mark.parametrize("counts", [2, 1, 0])
@pytest.mark.parametrize("certain", [True, False])
def test_every_token_follows_the_target_however_it_was_drafted(certain: bool, counts: int) -> None:
    """Drafted with certainty or drawn, from candidates that each row and slot has its own of; proposals or filler."""
    rows, generator = 200_000, torch.Generator().manual_seed(1)
    wanted = torch.softmax(torch.randn(3, VOCAB, generator=generator), dim=-1)  # of each slot, whatever came before
    candidates = torch.rand(rows, 2, VOCAB, generator=generator).argsort(-1)[..., :3]
    taste = 2 * torch.cos(candidates + torch.tensor([[0.0], [2.0]]))
    picked, probabilities = Sampler(1.0, generator).pick(taste)
    proposals = torch.full((rows,), counts)
    drafted = DraftedTokens.picked_from(candidates, picked, None if certain else probabilities, proposals)

    accepted, own = Sampler(1.0, generator).verify(wanted.log().expand(rows, 3, VOCAB), drafted)

    said = torch.cat((drafted.ids, own[:, None]), dim=1).scatter(1, accepted[:, None], own[:, None])
    for slot in range(counts + 1):
        reached = said[accepted >= slot, slot]
        bound = 5 * (wanted[slot] * (1 - wanted[slot]) / len(reached)).sqrt()  # five standard deviations
        assert ((parts(reached) - wanted[slot]).abs() < bound).all()
        assert slot == 2 or ((parts(drafted.ids[:, slot]) - wanted[slot]).abs() > bound).any(), "drafted otherwise"


def parts(ids: torch.Tensor) -> torch.Tensor:
    """How often each token of the vocabulary is among `ids`."""
    return torch.bincount(ids, minlength=VOCAB) / len(ids)


def test_filler_never_stands_even_where_the_target_would_say_the_same() -> None:
    logits = torch.zeros(3, 3, VOCAB)
    logits[:, :, 4] = 50.0
    ids = torch.full((3, 2), 4)
    vocabulary = torch.arange(VOCAB)

    for sampler in (Sampler(0.0), Sampler(1.0)):
        accepted, own = sampler.verify(
            logits, DraftedTokens.picked_from(vocabulary, ids, None, counts=torch.tensor([0, 1, 2]))
        )
        assert accepted.tolist() == [0, 1, 2]
        assert own.tolist() == [4, 4, 4]


def test_a_seed_repeats_the_output(small: LlamaForCausalLM) -> None:
    draft = make_draft(small, initializer_range=0.4)

    def run(seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return speculative_generate(
            small, draft, PROMPT, max_new_tokens=30, temperature=1.0, generator=generator
        ).tokens

    assert run(1) == run(1)
    assert run(1) != run(2)
