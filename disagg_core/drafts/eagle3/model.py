"""The EAGLE-3 draft: one decoder layer over fused target states, with the serving format's parameter names.

Position t holds the aux state of token t and the embedding of token t + 1, and predicts token t + 2. The layer's output
before the final norm is the state that the next draft step starts from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from disagg_core.drafts.eagle3.config import Eagle3Config
from disagg_core.drafts.layers import RMSNorm, SwiGLU
from disagg_core.drafts.linear import Linear
from disagg_core.drafts.method import DraftModel, FrozenParts
from disagg_core.drafts.rope import RotaryEmbedding, rotate
from disagg_core.drafts.vocab import VocabMap
from disagg_core.errors import IncompatibleDraft

_UNSURE = 0.5
"""Final norm's weight of a fresh draft whose LM head is the target's."""


class Attention(nn.Module):
    """Projections of the attention: queries, keys and values from ``[embedding ; state]``, 2H wide."""

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__()
        self.q_proj = Linear(2 * config.hidden_size, config.num_attention_heads * config.head_dim)
        self.k_proj = Linear(2 * config.hidden_size, config.num_key_value_heads * config.head_dim)
        self.v_proj = Linear(2 * config.hidden_size, config.num_key_value_heads * config.head_dim)
        self.o_proj = Linear(config.num_attention_heads * config.head_dim, config.hidden_size)


class DecoderLayer(nn.Module):
    """The draft's only layer; how its parts are put together is the caller's (training steps, or decoding)."""

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__()
        self.norm_before_residual = config.norm_before_residual
        self.self_attn = Attention(config)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def finish(self, state: Tensor, normed: Tensor, attended: Tensor) -> Tensor:
        """Return the layer's output ``[..., H]``: output projection, residuals and MLP.

        Args:
            state: ``[..., H]`` input state, the residual unless the config says that it is `normed`.
            normed: ``[..., H]``, `state` after `hidden_norm`.
            attended: ``[..., heads * head_dim]`` result of the attention.
        """
        state = normed if self.norm_before_residual else state
        state = state + self.self_attn.o_proj(attended)
        output: Tensor = state + self.mlp(self.post_attention_layernorm(state))
        return output


@dataclass
class DraftCache:
    """Keys and values of a decoding; grows by `Eagle3Draft.decode`, shrinks by `crop`."""

    keys: Tensor  # [batch, kv_heads, tokens, head_dim], rotated
    values: Tensor  # [batch, kv_heads, tokens, head_dim]
    positions: Tensor  # [batch, tokens]; negative where padding stands

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return self.keys.shape[2]

    def crop(self, length: int) -> None:
        """Keep the first `length` tokens."""
        self.keys, self.values = self.keys[:, :, :length], self.values[:, :, :length]
        self.positions = self.positions[:, :length]


class Eagle3Draft(DraftModel):
    """An EAGLE-3 draft model.

    Buffers ``t2d`` (bool [V]) and ``d2t`` (int64 offsets [K]) are the vocabulary map: identity when K == V, unset (all
    false) otherwise until `attach`, `set_vocab_map` or a state dict fills them. `embed_tokens` is zero until `attach`,
    `set_embedding` or a state dict fills it; it takes gradients until `set_embedding` freezes it. A draft that lacks
    either refuses to compute.

    Args:
        config: an `Eagle3Config`, or a dict in serving format.

    Raises:
        IncompatibleDraft: the config cannot be used.
    """

    method = "eagle3"
    config: Eagle3Config
    t2d: Tensor
    d2t: Tensor

    def __init__(self, config: Eagle3Config | Mapping[str, Any]) -> None:
        super().__init__()
        config = config if isinstance(config, Eagle3Config) else Eagle3Config.from_dict(config)
        self.config = config
        hidden, target = config.hidden_size, config.target_hidden_size
        self.embed_tokens = nn.Embedding(
            config.vocab_size, hidden, _weight=torch.zeros(config.vocab_size, hidden)
        )  # zeroed pages cost nothing before they are used
        self.fc = Linear(3 * target, hidden)
        if config.fc_norm:
            self.fc_norm = nn.ModuleList(RMSNorm(target, config.rms_norm_eps) for _ in range(3))
        self.midlayer = DecoderLayer(config)
        self.norm = RMSNorm(hidden, config.rms_norm_eps)
        self.lm_head = Linear(hidden, config.draft_vocab_size)
        identity = config.draft_vocab_size == config.vocab_size
        self.register_buffer("t2d", torch.full((config.vocab_size,), identity, dtype=torch.bool))
        self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.int64))
        self.rotary = RotaryEmbedding(config)
        self._complete = False
        self._lacks_head = False
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw fresh weights: normal with `initializer_range`; an embedding that is the target's is left alone."""
        for module in self.modules():
            if isinstance(module, Linear):
                nn.init.normal_(module.weight, std=self.config.initializer_range)
        if self.config.owns_embedding:
            nn.init.normal_(self.embed_tokens.weight, std=self.config.initializer_range)

    def attach(self, parts: FrozenParts, vocab_map: VocabMap | None = None) -> None:
        """Take the vocabulary map and, unless the draft has an embedding of its own, the target's; see `DraftModel`.

        A draft that was loaded without an LM head starts with the target's rows for its tokens.
        """
        if not self.config.owns_embedding:
            self.set_embedding(parts.embedding)
        if vocab_map is not None:
            self.set_vocab_map(vocab_map)
        if self._lacks_head:
            rows = parts.lm_head[self.to_target_ids(torch.arange(self.config.draft_vocab_size))]
            with torch.no_grad():
                self.lm_head.weight.copy_(rows / parts.logit_scale)
            self._lacks_head = False

    def start_with_targets_head(self) -> None:
        """Take the target's LM head at `attach`; a smaller norm keeps the first guesses, which are wrong, unsure."""
        self._lacks_head = True
        nn.init.constant_(self.norm.weight, _UNSURE)

    def require_complete(self) -> None:
        """Raise `IncompatibleDraft` if the embedding or the vocabulary map was never set."""
        if self._complete:
            return
        if self._lacks_head:
            raise IncompatibleDraft("the draft has no LM head: it shares the target's; call attach() first")
        if not bool(self.t2d.any()):
            raise IncompatibleDraft(
                "the draft has no vocabulary map: expected the ids of its tokens, found an empty map; call attach() or "
                "set_vocab_map() first"
            )
        if not bool(self.embed_tokens.weight.any()):
            raise IncompatibleDraft(
                "the draft has no embedding: expected the target's, found zeros; call attach() or set_embedding() first"
            )
        self._complete = True

    def set_embedding(self, weight: Tensor) -> None:
        """Use `weight` ``[V, H]`` as the embedding, without a copy, and freeze it.

        Raises:
            IncompatibleDraft: the shape is not ``[V, H]``; a draft of another width than its target's has its own.
        """
        expected = (self.config.vocab_size, self.config.hidden_size)
        if tuple(weight.shape) != expected:
            raise IncompatibleDraft(
                f"embedding: expected {list(expected)}, found {list(weight.shape)}; "
                "a draft whose width is not the target's trains an embedding of its own (config.owns_embedding)"
            )
        self.embed_tokens.weight = nn.Parameter(weight.detach(), requires_grad=False)

    def set_vocab_map(self, vocab_map: VocabMap) -> None:
        """Fill ``t2d`` and ``d2t``.

        Raises:
            IncompatibleDraft: the map's sizes are not the config's.
        """
        expected = (self.config.vocab_size, self.config.draft_vocab_size)
        found = (vocab_map.t2d.numel(), vocab_map.d2t.numel())
        if found != expected:
            raise IncompatibleDraft(f"vocabulary map: expected V, K = {expected}, found {found}")
        self.t2d.copy_(vocab_map.t2d)
        self.d2t.copy_(vocab_map.d2t)

    def serving_state_dict(self) -> dict[str, Tensor]:
        """Return the tensors of the serving format: the state dict without an embedding that is the target's."""
        state = self.state_dict()
        if not self.config.owns_embedding:
            del state["embed_tokens.weight"]
        return state

    def load_serving_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load what `serving_state_dict` returned; the embedding may be missing where it is the target's.

        Drafts that share the target's LM head come without one; they lack it until `attach`.

        Raises:
            IncompatibleDraft: tensors are missing, unknown or misshapen; all of them are named.
        """
        own = self.state_dict()
        optional = set() if self.config.owns_embedding else {"embed_tokens.weight", "lm_head.weight"}
        problems = [f"missing {name}" for name in own if name not in state and name not in optional]
        problems += [f"unknown {name}" for name in state if name not in own]
        problems += [
            f"{name}: expected {list(own[name].shape)}, found {list(state[name].shape)}"
            for name in own
            if name in state and own[name].shape != state[name].shape
        ]
        if problems:
            raise IncompatibleDraft("draft tensors do not fit the config: " + "; ".join(problems))
        self.load_state_dict(dict(state), strict=False)
        self._lacks_head = "lm_head.weight" not in state

    def project_aux(self, aux: Tensor) -> Tensor:
        """Return the state ``[..., H]`` of captured aux states ``[..., 3 * H_t]``, low layer to high."""
        aux = aux.to(self.fc.weight.dtype)
        if self.config.fc_norm:
            aux = torch.cat([norm(part) for norm, part in zip(self.fc_norm, aux.chunk(3, dim=-1), strict=True)], dim=-1)
        state: Tensor = self.fc(aux)
        return state

    def to_target_ids(self, draft_ids: Tensor) -> Tensor:
        """Return the target's token ids of draft ids (any shape, int64)."""
        return draft_ids + self.d2t[draft_ids]

    def new_cache(self, batch: int) -> DraftCache:
        """Return an empty cache for `batch` sequences."""
        weight = self.fc.weight
        empty = weight.new_empty(batch, self.config.num_key_value_heads, 0, self.config.head_dim)
        return DraftCache(empty, empty.clone(), torch.empty(batch, 0, dtype=torch.int64, device=weight.device))

    def decode(self, state: Tensor, input_ids: Tensor, positions: Tensor, cache: DraftCache) -> tuple[Tensor, Tensor]:
        """Run the layer over new tokens and add them to the cache.

        For a prefix, `state` is ``project_aux(aux)`` and `input_ids` the tokens **shifted left by one**; for a drafted
        token, `state` is the output of the step before and `input_ids` the token that it drafted (target's id).

        Args:
            state: ``[batch, n, H]``.
            input_ids: ``[batch, n]`` int64, target vocabulary.
            positions: ``[batch, n]`` int64 RoPE positions; negative marks padding, which is never attended to.
            cache: earlier tokens; changed in place.

        Returns:
            Logits ``[batch, n, K]`` and the next state ``[batch, n, H]`` (before the final norm).
        """
        self.require_complete()
        layer, config = self.midlayer, self.config
        batch, new = input_ids.shape
        embedded = F.embedding(input_ids, self.embed_tokens.weight).to(state.dtype)
        normed = layer.hidden_norm(state)
        x = torch.cat((layer.input_layernorm(embedded), normed), dim=-1)
        cos, sin = self.rotary(positions, cache.length + new, state.dtype)
        query = rotate(layer.self_attn.q_proj(x).view(batch, new, -1, config.head_dim), cos, sin)
        key = rotate(layer.self_attn.k_proj(x).view(batch, new, -1, config.head_dim), cos, sin)
        value = layer.self_attn.v_proj(x).view(batch, new, -1, config.head_dim)
        cache.keys = torch.cat((cache.keys, key.transpose(1, 2)), dim=2)
        cache.values = torch.cat((cache.values, value.transpose(1, 2)), dim=2)
        cache.positions = torch.cat((cache.positions, positions), dim=1)
        known, asked = cache.positions[:, None, :], positions[:, :, None]
        visible = ((known <= asked) & (known >= 0)) | (known == asked)  # [batch, n, tokens]; padding sees itself
        attended = F.scaled_dot_product_attention(
            query.transpose(1, 2), cache.keys, cache.values, attn_mask=visible[:, None], enable_gqa=True
        )
        next_state = layer.finish(state, normed, attended.transpose(1, 2).reshape(batch, new, -1))
        return self.lm_head(self.norm(next_state)), next_state
