"""The draft's side of a decoding: its cache over the accepted tokens, and the chains it drafts from there.

A row of the cache at position t stands for the target's aux state of token t and the embedding of token t + 1; its
output predicts token t + 2. While a chain is drafted the draft's own states take the place of the target's; afterwards
they are dropped and the accepted tokens enter with the target's states. Rows of a batch that keep fewer tokens than
the longest are filled up with padding, which has a negative position and is never attended to.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from disagg_core.drafts.eagle3.model import DraftCache, Eagle3Draft
from disagg_core.drafts.sampling import DraftedTokens, Sampler

_PADDING = -1
_LOGITS_AT_ONCE = 1 << 25
"""Most logits that the draft computes at once over a prompt; only the last token's are used."""


class DraftChain:
    """Drafts chains for a batch; starts from the target's prefill of the prompts.

    Args:
        draft: on the target's device, with its embedding and a vocabulary map.
        sampler: chooses the drafted tokens.
        prompts: token ids, unlike lengths.
        aux: [batch, longest, 3 * H_t], the target's states, padded on the left.
        first: [batch], the token that follows each prompt.
    """

    def __init__(
        self, draft: Eagle3Draft, sampler: Sampler, prompts: Sequence[Sequence[int]], aux: Tensor, first: Tensor
    ) -> None:
        self._draft = draft
        self._sampler = sampler
        device = draft.fc.weight.device
        self.target_ids = draft.to_target_ids(torch.arange(draft.config.draft_vocab_size, device=device))
        batch, longest = aux.shape[:2]
        pads = torch.tensor([longest - len(prompt) for prompt in prompts], device=device)[:, None]
        places = torch.arange(longest, device=device)[None, :]
        positions = torch.where(places >= pads, places - pads, _PADDING)
        shifted = [[0] * (longest - len(prompt)) + list(prompt[1:]) for prompt in prompts]
        known = torch.tensor(shifted, dtype=torch.int64, device=device).view(batch, longest - 1)
        ids = torch.cat((known, first[:, None]), dim=1)
        self._cache: DraftCache = draft.new_cache(batch)
        states = draft.project_aux(aux)
        step = max(1, _LOGITS_AT_ONCE // (batch * draft.config.draft_vocab_size))
        for start in range(0, longest, step):
            part = slice(start, start + step)
            logits, after = draft.decode(states[:, part], ids[:, part], positions[:, part], self._cache)
        self._logits, self._state = logits[:, -1], after[:, -1]

    def propose(self, count: int, lengths: Tensor) -> DraftedTokens:
        """Draft `count` tokens after each row; `lengths` [batch] are the tokens that the target has in its cache."""
        kept, logits, state = self._cache.length, self._logits, self._state
        picked, probabilities = [], []
        for step in range(count):
            token, weights = self._sampler.pick(logits)
            picked.append(token)
            probabilities.append(weights)
            if step < count - 1:
                ids = self._draft.to_target_ids(token)[:, None]
                all_logits, after = self._draft.decode(state[:, None], ids, (lengths + step)[:, None], self._cache)
                logits, state = all_logits[:, -1], after[:, -1]
        self._cache.crop(kept)
        chain = torch.stack(picked, dim=1)
        drawn_from = [weights for weights in probabilities if weights is not None]
        return DraftedTokens(
            self._draft.to_target_ids(chain), chain, torch.stack(drawn_from, dim=1) if drawn_from else None
        )

    def follow(self, aux: Tensor, drafted: DraftedTokens, accepted: Tensor, own: Tensor, lengths: Tensor) -> None:
        """Take the accepted tokens and the target's `own` [batch] into the cache.

        Args:
            aux: [batch, k + 1, 3 * H_t], the target's states of its last token and the drafted ones.
            drafted: the chain that was verified.
            accepted: [batch], how many of its tokens stand.
            own: [batch], the target's token after them.
            lengths: [batch], tokens in the target's cache before the pass.
        """
        rows = int(accepted.max()) + 1
        steps = torch.arange(rows, device=aux.device)[None, :]
        following = torch.cat((drafted.ids, own[:, None]), dim=1)[:, :rows]
        ids = torch.where(steps == accepted[:, None], own[:, None], following)
        positions = torch.where(steps <= accepted[:, None], lengths[:, None] + steps, _PADDING)
        logits, after = self._draft.decode(self._draft.project_aux(aux[:, :rows]), ids, positions, self._cache)
        batch = torch.arange(len(accepted), device=aux.device)
        self._logits, self._state = logits[batch, accepted], after[batch, accepted]

    def select(self, rows: Tensor) -> None:
        """Go on with these `rows` [remaining] of the batch only."""
        cache = self._cache
        self._cache = DraftCache(cache.keys[rows], cache.values[rows], cache.positions[rows])
        self._logits, self._state = self._logits[rows], self._state[rows]
