"""P-EAGLE's drafter: one pass over what was accepted since the last one and the slots to be filled after it.

A real slot at position t holds the target's states of token t and the embedding of token t + 1. The last one, with the
token that was emitted last, gives the first proposal; each slot after it gives the next. Seen by position, training's
rule is a causal one. Only real slots stay in the cache. Rows of a batch that keep fewer tokens than the longest are
filled up with padding, which has a negative position and is never attended to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from disagg_core.drafts.linear import linear
from disagg_core.drafts.method import Drafter
from disagg_core.drafts.p_eagle.model import PEagleDraft
from disagg_core.drafts.sampling import DraftedTokens, Sampler

_PADDING = -1
_PREFILL_SLOTS = 512
"""Slots of a prompt that go through the draft at once."""


class SlotCache:
    """Keys and values of the real slots of a decoding, for every layer of the draft."""

    def __init__(self, draft: PEagleDraft, batch: int) -> None:
        config, weight = draft.config, draft.fc.weight
        empty = weight.new_empty(batch, config.num_key_value_heads, 0, config.head_dim)
        self._keys = [empty] * config.num_hidden_layers
        self._values = [empty] * config.num_hidden_layers
        self._window = config.sliding_window
        self.positions = torch.empty(batch, 0, dtype=torch.int64, device=weight.device)  # negative for padding

    def extend(self, positions: Tensor) -> Tensor:
        """Add the `positions` [batch, n] of new slots; return what each of them sees, bool [batch, 1, n, slots]."""
        self.positions = torch.cat((self.positions, positions), dim=1)
        known, asked = self.positions[:, None, :], positions[:, :, None]
        visible = (known <= asked) & (known >= 0)
        if self._window is not None:
            visible &= known > asked - self._window
        return (visible | (known == asked))[:, None]  # padding sees itself

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> Tensor:
        """Add a layer's keys and values [batch, n, kv_heads, d]; return the result [batch, n, heads, d]."""
        self._keys[layer] = torch.cat((self._keys[layer], key.transpose(1, 2)), dim=2)
        self._values[layer] = torch.cat((self._values[layer], value.transpose(1, 2)), dim=2)
        attended = F.scaled_dot_product_attention(
            query.transpose(1, 2), self._keys[layer], self._values[layer], attn_mask=visible, enable_gqa=True
        )
        return attended.transpose(1, 2)

    def crop(self, length: int) -> None:
        """Keep the first `length` slots."""
        self._keys = [keys[:, :, :length] for keys in self._keys]
        self._values = [values[:, :, :length] for values in self._values]
        self.positions = self.positions[:, :length]

    def select(self, rows: Tensor) -> None:
        """Keep these `rows` of the batch."""
        self._keys = [keys[rows] for keys in self._keys]
        self._values = [values[rows] for values in self._values]
        self.positions = self.positions[rows]


@dataclass(frozen=True)
class _Slots:
    """The real slots of the next pass; the last one of row i is at column `last[i]`."""

    states: Tensor  # [batch, n, 3 * H]
    ids: Tensor  # [batch, n]
    positions: Tensor  # [batch, n]
    last: Tensor  # [batch]

    def select(self, rows: Tensor) -> _Slots:
        return _Slots(self.states[rows], self.ids[rows], self.positions[rows], self.last[rows])


class ParallelDrafter(Drafter):
    """Drafts all tokens of a proposal at once; arguments as those of `DraftMethod.drafter`."""

    def __init__(
        self, draft: PEagleDraft, sampler: Sampler, prompts: Sequence[Sequence[int]], states: Tensor, first: Tensor
    ) -> None:
        draft.require_complete()
        self._draft, self._sampler = draft, sampler
        self._cache = SlotCache(draft, len(prompts))
        device = draft.fc.weight.device
        batch, longest = states.shape[:2]
        pads = torch.tensor([longest - len(prompt) for prompt in prompts], device=device)[:, None]
        places = torch.arange(longest, device=device)[None, :]
        positions = torch.where(places >= pads, places - pads, _PADDING)
        shifted = [[0] * (longest - len(prompt)) + list(prompt[1:]) for prompt in prompts]
        known = torch.tensor(shifted, dtype=torch.int64, device=device).view(batch, longest - 1)
        ids = torch.cat((known, first[:, None]), dim=1)
        for start in range(0, longest - 1, _PREFILL_SLOTS):
            part = slice(start, min(start + _PREFILL_SLOTS, longest - 1))
            self._run(draft.project_states(states[:, part]), ids[:, part], positions[:, part])
        nothing = torch.zeros(batch, dtype=torch.int64, device=device)
        self._waiting = _Slots(states[:, -1:], ids[:, -1:], positions[:, -1:], nothing)

    def propose(self, count: int, lengths: Tensor) -> DraftedTokens:
        """Draft `count` tokens for each row in one pass."""
        draft, real = self._draft, self._waiting
        batch, kept = len(lengths), self._cache.positions.shape[1] + real.ids.shape[1]
        unfilled = draft.project_states(draft.mask_hidden).expand(batch, count - 1, -1)
        mask_ids = real.ids.new_full((batch, count - 1), draft.config.mask_token_id)
        slots = torch.arange(count - 1, device=lengths.device)
        after = self._run(
            torch.cat((draft.project_states(real.states), unfilled), dim=1),
            torch.cat((real.ids, mask_ids), dim=1),
            torch.cat((real.positions, lengths[:, None] + slots), dim=1),
        )
        self._cache.crop(kept)
        first = after[torch.arange(batch, device=lengths.device), real.last]
        chosen = torch.cat((first[:, None], after[:, real.ids.shape[1] :]), dim=1)
        logits = linear(draft.norm(chosen), draft.lm_head.weight)
        return DraftedTokens.picked_from(draft.target_ids, *self._sampler.pick(logits))

    def follow(self, states: Tensor, drafted: DraftedTokens, accepted: Tensor, own: Tensor, lengths: Tensor) -> None:
        """Keep the accepted tokens and the target's own, with the target's states, for the next pass."""
        width = int(accepted.max()) + 1
        steps = torch.arange(width, device=states.device)[None, :]
        following = torch.cat((drafted.ids, own[:, None]), dim=1)[:, :width]
        self._waiting = _Slots(
            states=states[:, :width],
            ids=torch.where(steps == accepted[:, None], own[:, None], following),
            positions=torch.where(steps <= accepted[:, None], lengths[:, None] + steps, _PADDING),
            last=accepted,
        )

    def select(self, rows: Tensor) -> None:
        """Go on with these `rows` [remaining] of the batch only."""
        self._cache.select(rows)
        self._waiting = self._waiting.select(rows)

    def _run(self, states: Tensor, ids: Tensor, positions: Tensor) -> Tensor:
        """Return the states ``[batch, n, H]`` of new slots after the last layer, and add them to the cache."""
        visible = self._cache.extend(positions)
        angles = self._draft.rotary(positions, self._cache.positions.shape[1], states.dtype)
        return self._draft.backbone(
            self._draft.embed(ids),
            states,
            angles,
            lambda layer, query, key, value: self._cache.attend(layer, query, key, value, visible),
        )
