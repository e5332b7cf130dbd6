"""DFlash's drafter: a cache over the context, and the block that is drafted behind it in one pass.

The context of a layer are keys and values made of the target's states of all tokens in the target's cache; a block's
own keys and values are dropped with the block. A block has a slot for the token emitted last and one for each token
asked for, as in the engines: fewer than the draft was trained with if fewer are asked for. Rows of a batch that keep
fewer tokens than the longest are filled up with padding, which has a negative position and is never seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from disagg_core.drafts.dflash.config import LayerMask
from disagg_core.drafts.dflash.model import DecoderLayer, DFlashDraft
from disagg_core.drafts.method import Drafter
from disagg_core.drafts.sampling import DraftedTokens, Sampler

_PADDING = -1


@dataclass
class ContextCache:
    """The context's keys and values of each layer; grows by `extend`."""

    keys: list[Tensor]  # [batch, rows, kv_heads, d] of each layer, rotated
    values: list[Tensor]  # likewise, not rotated
    positions: Tensor  # [batch, rows]; negative where padding stands

    @classmethod
    def empty(cls, draft: DFlashDraft, batch: int) -> ContextCache:
        """Return a cache without rows for `batch` sequences."""
        config, weight = draft.config, draft.fc.weight
        nothing = weight.new_empty(batch, 0, config.num_key_value_heads, config.head_dim)
        layers = config.num_hidden_layers
        positions = torch.empty(batch, 0, dtype=torch.int64, device=weight.device)
        return cls([nothing] * layers, [nothing] * layers, positions)

    def extend(self, draft: DFlashDraft, states: Tensor, positions: Tensor) -> None:
        """Add the target's states ``[batch, n, C * H]`` at `positions` ``[batch, n]``."""
        context = draft.context(states)
        angles = draft.rotary(positions, 0, context.dtype)
        for index, layer in enumerate(draft.layers):
            assert isinstance(layer, DecoderLayer)
            key, value = layer.self_attn.keys(context, angles)
            self.keys[index] = torch.cat((self.keys[index], key), dim=1)
            self.values[index] = torch.cat((self.values[index], value), dim=1)
        self.positions = torch.cat((self.positions, positions), dim=1)

    def select(self, rows: Tensor) -> None:
        """Keep these `rows` of the batch."""
        self.keys, self.values = [x[rows] for x in self.keys], [x[rows] for x in self.values]
        self.positions = self.positions[rows]


def draft_block(draft: DFlashDraft, cache: ContextCache, ids: Tensor, positions: Tensor) -> Tensor:
    """Return the states after the final norm ``[batch, K, H]`` of a block behind the cached context.

    Args:
        draft: with the target's parts.
        cache: the context; not changed.
        ids: ``[batch, K]``, the token emitted last, then mask tokens.
        positions: ``[batch, K]``.
    """
    state = draft.embed(ids)
    angles = draft.rotary(positions, 0, state.dtype)
    for index, (layer, mask) in enumerate(zip(draft.layers, draft.config.layer_masks, strict=True)):
        assert isinstance(layer, DecoderLayer)
        seen = _visible(mask, cache.positions, positions)

        def attend(query: Tensor, key: Tensor, value: Tensor, index: int = index, seen: Tensor = seen) -> Tensor:
            keys = torch.cat((cache.keys[index], key), dim=1).transpose(1, 2)
            values = torch.cat((cache.values[index], value), dim=1).transpose(1, 2)
            return F.scaled_dot_product_attention(
                query.transpose(1, 2), keys, values, attn_mask=seen[:, None], enable_gqa=True
            ).transpose(1, 2)

        state = layer(state, angles, attend)
    normed: Tensor = draft.norm(state)
    return normed


def _visible(mask: LayerMask, context: Tensor, positions: Tensor) -> Tensor:
    """Return bool ``[batch, K, rows + K]``, True where a slot sees."""
    slots = torch.arange(positions.shape[1], device=positions.device)
    start = positions[:, :1]
    far = ((context >= 0) & (context < start))[:, None, :].expand(-1, len(slots), -1)
    if mask.window is not None:
        far = far & (context[:, None, :] >= start[:, :, None] + mask.first_seen(slots)[None, :, None])
    near = (
        slots[None, :] <= slots[:, None] if mask.causal else torch.ones_like(slots[:, None] + slots, dtype=torch.bool)
    )
    return torch.cat((far, near.expand(len(positions), -1, -1)), dim=2)


class BlockDrafter(Drafter):
    """Drafts a block for each row of a batch; arguments as those of `DraftMethod.drafter`."""

    def __init__(
        self, draft: DFlashDraft, sampler: Sampler, prompts: Sequence[Sequence[int]], states: Tensor, first: Tensor
    ) -> None:
        self._draft, self._sampler, self._last = draft, sampler, first
        self._cache = ContextCache.empty(draft, len(prompts))
        longest = states.shape[1]
        pads = torch.tensor([longest - len(prompt) for prompt in prompts], device=states.device)[:, None]
        places = torch.arange(longest, device=states.device)[None, :]
        self._cache.extend(draft, states, torch.where(places >= pads, places - pads, _PADDING))

    def propose(self, count: int, lengths: Tensor) -> DraftedTokens:
        """Draft `count` tokens, at most K - 1, for each row."""
        ids = torch.full((len(lengths), count + 1), self._draft.config.mask_token_id, device=lengths.device)
        ids[:, 0] = self._last
        positions = lengths[:, None] + torch.arange(count + 1, device=lengths.device)
        return self._choose(draft_block(self._draft, self._cache, ids, positions)[:, 1:])

    def _choose(self, hidden: Tensor) -> DraftedTokens:
        """Return tokens for the slots ``[batch, k, H]`` after the one emitted last, each slot on its own."""
        logits = self._draft.logits(hidden)
        return DraftedTokens.picked_from(
            torch.arange(logits.shape[-1], device=logits.device), *self._sampler.pick(logits)
        )

    def follow(self, states: Tensor, drafted: DraftedTokens, accepted: Tensor, own: Tensor, lengths: Tensor) -> None:
        """Take the states of the token emitted last and of the accepted ones into the context."""
        rows = int(accepted.max()) + 1
        steps = torch.arange(rows, device=states.device)[None, :]
        positions = torch.where(steps <= accepted[:, None], lengths[:, None] + steps, _PADDING)
        self._cache.extend(self._draft, states[:, :rows], positions)
        self._last = own

    def select(self, rows: Tensor) -> None:
        """Go on with these `rows` [remaining] of the batch only."""
        self._cache.select(rows)
        self._last = self._last[rows]
