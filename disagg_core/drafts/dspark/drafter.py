"""DSpark's drafter: DFlash's block in one pass, and a walk over its slots, each of which knows the token before."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from disagg_core.drafts.dflash.drafter import BlockDrafter, draft_block
from disagg_core.drafts.dspark.model import DSparkDraft
from disagg_core.drafts.sampling import DraftedTokens, Sampler


@dataclass(frozen=True)
class Walk:
    """What a walk over K slots chose."""

    tokens: Tensor  # [batch, K]
    logits: Tensor  # [batch, K, V] that they were chosen from
    probabilities: Tensor | None  # [batch, K, V]; None when greedy
    confidence: Tensor | None  # [batch, K] logits; None without a head


def walk(draft: DSparkDraft, base: Tensor, hidden: Tensor, first: Tensor, sampler: Sampler) -> Walk:
    """Choose a token for each slot, one after the other.

    Args:
        draft: with the target's parts.
        base: logits without the bias, ``[batch, K, V]``.
        hidden: states after the final norm, ``[batch, K, H]``.
        first: the token before the first slot's, ``[batch]``.
        sampler: chooses.
    """
    head, before = draft.markov_head, first
    state = head.start(hidden)
    tokens, logits, weights, confidence = [], [], [], []
    for scores, slot in zip(base.unbind(1), hidden.unbind(1), strict=True):
        embedded = head.markov_w1(before)
        vector, state = head.step(embedded, slot, state)
        logits.append(scores + head.bias(vector))
        before, drawn_from = sampler.pick(logits[-1])
        tokens.append(before)
        if drawn_from is not None:
            weights.append(drawn_from)
        if draft.confidence_head is not None:
            confidence.append(draft.confidence_head(slot, embedded))
    return Walk(
        tokens=torch.stack(tokens, 1),
        logits=torch.stack(logits, 1),
        probabilities=torch.stack(weights, 1) if weights else None,
        confidence=torch.stack(confidence, 1) if confidence else None,
    )


class WalkingDrafter(BlockDrafter):
    """Drafts a block of slots for each row, all of which propose; arguments as those of `DraftMethod.drafter`."""

    _draft: DSparkDraft

    def propose(self, count: int, lengths: Tensor) -> DraftedTokens:
        """Draft `count` tokens, at most K, for each row; fewer count where one is less confident than the threshold.

        A token's confidence depends on the tokens before it and not on itself, so the cut changes no distribution.
        """
        draft = self._draft
        ids = torch.full((len(lengths), count), draft.config.mask_token_id, device=lengths.device)
        ids[:, 0] = self._last
        positions = lengths[:, None] + torch.arange(count, device=lengths.device)
        hidden = draft_block(draft, self._cache, ids, positions)
        walked = walk(draft, draft.logits(hidden), hidden, self._last, self._sampler)
        counts = None
        if walked.confidence is not None and draft.config.confidence_threshold > 0:
            sure = walked.confidence.float().sigmoid() >= draft.config.confidence_threshold
            counts = sure.long().cumprod(1).sum(1)
        every = torch.arange(draft.config.vocab_size, device=lengths.device)
        return DraftedTokens.picked_from(every, walked.tokens, walked.probabilities, counts)
