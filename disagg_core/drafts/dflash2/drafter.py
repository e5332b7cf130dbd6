"""DFlash2's drafter: DFlash's, whose slots are chosen one after the other among their candidates."""

from __future__ import annotations

import torch
from torch import Tensor

from disagg_core.drafts.dflash.drafter import BlockDrafter
from disagg_core.drafts.dflash2.model import DFlash2Draft
from disagg_core.drafts.sampling import DraftedTokens, Sampler


class SelectingDrafter(BlockDrafter):
    """Drafts a block for each row of a batch; a token is drawn from the scores of its slot's candidates alone."""

    _draft: DFlash2Draft

    def _choose(self, hidden: Tensor) -> DraftedTokens:
        """Return tokens for the slots ``[batch, k, H]``, each by the one before."""
        return walk(self._draft, self._sampler, hidden, self._last)


def walk(draft: DFlash2Draft, sampler: Sampler, hidden: Tensor, before: Tensor) -> DraftedTokens:
    """Choose a token for each slot among its candidates, scored by the token chosen before.

    Args:
        draft: with the target's parts.
        sampler: chooses from the scores.
        hidden: states after the final norm of slots 1 ..., ``[batch, k, H]``.
        before: the token before the first of them, ``[batch]``.
    """
    logits, candidates = draft.logits(hidden).topk(draft.config.selector_top_k)
    picked, probabilities = [], []
    for slot in range(hidden.shape[1]):
        scores = draft.candidate_selector(hidden[:, slot], before, candidates[:, slot], logits[:, slot])
        place, weights = sampler.pick(scores)
        picked.append(place)
        probabilities.append(weights)
        before = candidates[:, slot].gather(1, place[:, None]).squeeze(1)
    drawn_from = [weights for weights in probabilities if weights is not None]
    return DraftedTokens.picked_from(
        candidates, torch.stack(picked, dim=1), torch.stack(drawn_from, dim=1) if drawn_from else None
    )
