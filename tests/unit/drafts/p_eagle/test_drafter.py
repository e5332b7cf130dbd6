"""What is trained is what is drafted: every depth of every anchor, in batches of unlike rows, pass after pass."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from disagg_core.drafts.p_eagle import drafter as drafter_module
from disagg_core.drafts.p_eagle.drafter import ParallelDrafter
from disagg_core.drafts.p_eagle.loss import parallel_depths
from disagg_core.drafts.p_eagle.model import PEagleDraft
from disagg_core.drafts.sampling import DraftedTokens, Sampler
from disagg_core.evaluation import generate_all
from tests.contract.drafts.kit import VOCAB, Case, tiny_target
from tests.unit.drafts.p_eagle.cases import small_draft

pytestmark = pytest.mark.unit

TOKENS = 30


class Recorder(Sampler):
    """Keeps the logits that it was last asked about."""

    logits: Tensor

    def pick(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        self.logits = logits
        return super().pick(logits)


def sequence(draft: PEagleDraft, ordinal: int) -> tuple[Tensor, Tensor]:
    """Token ids [T] and captured states [T, 3 * H]."""
    generator = torch.Generator().manual_seed(70 + ordinal)
    ids = torch.randint(4, 39, (TOKENS,), generator=generator)
    return ids, torch.randn(TOKENS, 3 * draft.config.hidden_size, generator=generator)


def trained_logits(draft: PEagleDraft, ids: Tensor, states: Tensor) -> Tensor:
    """The training step's logits of every anchor at every depth, [T, D, K]; depths beyond the end are zero."""
    depths = draft.config.depths
    grid = [(anchor, depth) for depth in range(depths) for anchor in range(TOKENS - depth)]
    anchors, depth = torch.tensor(grid).T
    inputs = {
        "input_ids": torch.cat((ids[1:], torch.zeros(1, dtype=ids.dtype)))[None],
        "loss_mask": torch.ones(1, TOKENS),
        "hidden_states": states[None],
        "target_logits": torch.zeros(1, TOKENS, draft.config.vocab_size),
        "anchor_pos": anchors,
        "depth": depth,
    }
    logits = parallel_depths(draft, inputs).logits[0]
    table = torch.zeros(TOKENS, depths, logits.shape[-1])
    table[anchors, depth] = logits
    return table


@pytest.mark.parametrize(("window", "normed"), [(None, False), (9, False), (None, True)])
def test_a_pass_computes_what_was_trained(window: int | None, normed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drafter_module, "_PREFILL_SLOTS", 4)
    layers = ["sliding_attention"] * 3 if window else None
    draft = small_draft(sliding_window=window, layer_types=layers, norm_before_residual=normed)
    known = [sequence(draft, ordinal) for ordinal in range(3)]
    with torch.inference_mode():
        tables = [trained_logits(draft, *pair) for pair in known]
        lengths, sampler = [12, 3, 7], Recorder(0.0)
        states = torch.zeros(3, 12, 3 * draft.config.hidden_size)
        for row, (_, captured), length in zip(states, known, lengths, strict=True):
            row[12 - length :] = captured[:length]
        first = torch.stack([ids[length] for (ids, _), length in zip(known, lengths, strict=True)])
        prompts = [ids[:length].tolist() for (ids, _), length in zip(known, lengths, strict=True)]
        drafting = ParallelDrafter(draft, sampler, prompts, states, first)

        for accepted, count in (([2, 0, 1], 3), ([0, 4, 2], 5), ([1, 1, 1], 4)):
            drafting.propose(count, torch.tensor(lengths))
            for row, length in enumerate(lengths):
                torch.testing.assert_close(sampler.logits[row], tables[row][length - 1, :count], atol=1e-5, rtol=1e-5)
            advance(drafting, known, lengths, accepted, count)

        drafting.select(torch.tensor([2, 0]))
        drafting.propose(2, torch.tensor([lengths[2], lengths[0]]))
        for row, kept in enumerate((2, 0)):
            torch.testing.assert_close(sampler.logits[row], tables[kept][lengths[kept] - 1, :2], atol=1e-5, rtol=1e-5)


def advance(
    drafting: ParallelDrafter, known: list[tuple[Tensor, Tensor]], lengths: list[int], accepted: list[int], count: int
) -> None:
    """Go on as if so many of each row's own tokens had been drafted and accepted; `lengths` grow."""
    rows = list(zip(known, lengths, strict=True))
    ids = torch.stack([ids[length + 1 : length + 1 + count] for (ids, _), length in rows])
    states = torch.stack([states[length : length + count + 1] for (_, states), length in rows])
    own = torch.stack([pair[0][at + kept + 1] for pair, at, kept in zip(known, lengths, accepted, strict=True)])
    drafted = DraftedTokens(ids, ids, torch.arange(40))
    drafting.follow(states, drafted, torch.tensor(accepted), own, torch.tensor(lengths))
    lengths[:] = [length + kept + 1 for length, kept in zip(lengths, accepted, strict=True)]


@pytest.mark.parametrize("draft_tokens", [1, 4])
def test_greedy_decoding_of_unlike_prompts_is_lossless(draft_tokens: int) -> None:
    case = Case.of("p_eagle")
    target, draft = tiny_target(), case.draft().eval().requires_grad_(False)
    prompts = [[5], [7, 3, 8, 20, 31, 6, 40], [VOCAB - 2, 4], [9] * 11]

    plain = generate_all(target, None, prompts, max_new_tokens=24)
    drafted = generate_all(target, draft, prompts, draft_tokens=draft_tokens, max_new_tokens=24)

    assert [one.tokens for one in drafted] == [one.tokens for one in plain]


def test_sampled_proposals_come_with_what_they_were_drawn_from() -> None:
    draft = small_draft()
    ids, states = sequence(draft, 0)
    sampler = Recorder(0.7, torch.Generator().manual_seed(1))
    with torch.inference_mode():
        drafting = ParallelDrafter(draft, sampler, [ids[:6].tolist()], states[None, :6], ids[6:7])
        drafted = drafting.propose(4, torch.tensor([6]))

    assert drafted.probabilities is not None
    torch.testing.assert_close(drafted.probabilities, (sampler.logits / 0.7).softmax(-1))
    assert torch.equal(drafted.ids, draft.target_ids[drafted.picked])
    assert bool(draft.t2d[drafted.ids].all())
