"""EAGLE-3's drafter: a cache over the accepted tokens, and the chains that are drafted from there.

An entry of the cache at position t stands for the target's aux state of token t and the embedding of token t + 1; its
output predicts token t + 2. While a chain is drafted the draft's own states take the place of the target's; afterwards
they are dropped and the accepted tokens enter with the target's states. Rows of a batch that keep fewer tokens than
the longest are filled up with padding, which has a negative position and is never attended to.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from disagg_core.drafts.eagle3.model import DraftCache, Eagle3Draft
from disagg_core.drafts.method import Drafter
from disagg_core.drafts.sampling import DraftedTokens, Sampler

_PADDING = -1
_LOGITS_AT_ONCE = 1 << 25
"""Most logits that the draft computes at once over a prompt; only the last token's are used."""


class DraftChain(Drafter):
    """Drafts a chain for each row of a batch; arguments as those of `DraftMethod.drafter`."""

    def __init__(
        self, draft: Eagle3Draft, sampler: Sampler, prompts: Sequence[Sequence[int]], states: Tensor, first: Tensor
    ) -> None:
        self._draft = draft
        self._sampler = sampler
        device = draft.fc.weight.device
        self._target_ids = draft.to_target_ids(torch.arange(draft.config.draft_vocab_size, device=device))  # [K]
        batch, longest = states.shape[:2]
        pads = torch.tensor([longest - len(prompt) for prompt in prompts], device=device)[:, None]
        places = torch.arange(longest, device=device)[None, :]
        positions = torch.where(places >= pads, places - pads, _PADDING)
        shifted = [[0] * (longest - len(prompt)) + list(prompt[1:]) for prompt in prompts]
        known = torch.tensor(shifted, dtype=torch.int64, device=device).view(batch, longest - 1)
        ids = torch.cat((known, first[:, None]), dim=1)
        self._cache: DraftCache = draft.new_cache(batch)
        projected = draft.project_aux(states)
        step = max(1, _LOGITS_AT_ONCE // (batch * draft.config.draft_vocab_size))
        for start in range(0, longest, step):
            part = slice(start, start + step)
            logits, after = draft.decode(projected[:, part], ids[:, part], positions[:, part], self._cache)
        self._logits, self._state = logits[:, -1], after[:, -1]

    def propose(self, count: int, lengths: Tensor) -> DraftedTokens:
        """Draft `count` tokens for each row, one after the other."""
        kept, logits, state = self._cache.length, self._logits, self._state
        picked, probabilities = [], []
        for step in range(count):
            token, weights = self._sampler.pick(logits)
            picked.append(token)
            probabilities.append(weights)
            if step < count - 1:
                ids, positions = self._target_ids[token][:, None], (lengths + step)[:, None]
                all_logits, after = self._draft.decode(state[:, None], ids, positions, self._cache)
                logits, state = all_logits[:, -1], after[:, -1]
        self._cache.crop(kept)
        drawn_from = [weights for weights in probabilities if weights is not None]
        return DraftedTokens.picked_from(
            self._target_ids, torch.stack(picked, dim=1), torch.stack(drawn_from, dim=1) if drawn_from else None
        )

    def follow(self, states: Tensor, drafted: DraftedTokens, accepted: Tensor, own: Tensor, lengths: Tensor) -> None:
        """Take the accepted tokens and the target's own into the cache, with the target's states."""
        rows = int(accepted.max()) + 1
        steps = torch.arange(rows, device=states.device)[None, :]
        following = torch.cat((drafted.ids, own[:, None]), dim=1)[:, :rows]
        ids = torch.where(steps == accepted[:, None], own[:, None], following)
        positions = torch.where(steps <= accepted[:, None], lengths[:, None] + steps, _PADDING)
        logits, after = self._draft.decode(self._draft.project_aux(states[:, :rows]), ids, positions, self._cache)
        batch = torch.arange(len(accepted), device=states.device)
        self._logits, self._state = logits[batch, accepted], after[batch, accepted]

    def select(self, rows: Tensor) -> None:
        """Go on with these `rows` [remaining] of the batch only."""
        cache = self._cache
        self._cache = DraftCache(cache.keys[rows], cache.values[rows], cache.positions[rows])
        self._logits, self._state = self._logits[rows], self._state[rows]
