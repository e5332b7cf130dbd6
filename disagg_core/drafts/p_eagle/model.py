"""The P-EAGLE draft: EAGLE-3's layer and ordinary layers after it, over real slots and slots yet to be filled.

A real slot at position t holds the target's states of token t and the embedding of token t + 1, and predicts token
t + 2. The slots after it hold a learned state and the mask token instead, and predict the tokens that follow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from disagg_core.drafts.layers import RMSNorm, SwiGLU
from disagg_core.drafts.linear import Linear
from disagg_core.drafts.method import DraftModel, FrozenParts
from disagg_core.drafts.p_eagle.config import PEagleConfig
from disagg_core.drafts.rope import RotaryEmbedding, rotate
from disagg_core.drafts.vocab import VocabMap
from disagg_core.errors import IncompatibleDraft

Angles: TypeAlias = tuple[Tensor, Tensor]
"""Cosines and sines of positions, each [..., head_dim]."""
Attend: TypeAlias = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""Turns a layer's index, queries [..., n, heads, d], keys and values [..., n, kv_heads, d] into [..., n, heads, d]."""

LAYERS_READ = 3
"""Target layers whose outputs are laid side by side as a draft's input."""


class Attention(nn.Module):
    """Projections of an attention over inputs `width` wide; what sees what is the caller's."""

    def __init__(self, config: PEagleConfig, width: int) -> None:
        super().__init__()
        self.q_proj = Linear(width, config.num_attention_heads * config.head_dim)
        self.k_proj = Linear(width, config.num_key_value_heads * config.head_dim)
        self.v_proj = Linear(width, config.num_key_value_heads * config.head_dim)
        self.o_proj = Linear(config.num_attention_heads * config.head_dim, config.hidden_size)
        self._head_dim = config.head_dim

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values, each ``[..., heads, d]``, before RoPE, of ``x`` ``[..., width]``."""
        query, key, value = (
            projection(x).view(*x.shape[:-1], -1, self._head_dim)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        return query, key, value


class DecoderLayer(nn.Module):
    """An ordinary decoder layer."""

    input_width = 1

    def __init__(self, config: PEagleConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config, self.input_width * config.hidden_size)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def finish(self, state: Tensor, attended: Tensor) -> Tensor:
        """Return the output ``[..., H]``: output projection, residuals and MLP.

        Args:
            state: ``[..., H]``, the residual.
            attended: ``[..., heads, d]``, the attention's result.
        """
        state = state + self.self_attn.o_proj(attended.flatten(-2))
        output: Tensor = state + self.mlp(self.post_attention_layernorm(state))
        return output


class FirstLayer(DecoderLayer):
    """EAGLE-3's layer, whose attention reads ``[embedding ; state]``."""

    input_width = 2

    def __init__(self, config: PEagleConfig) -> None:
        super().__init__(config)
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class PEagleDraft(DraftModel):
    """A P-EAGLE draft model, with the serving format's parameter names.

    The embedding is the draft's own and trained; it starts as a copy of the target's, which `attach` makes unless the
    weights were loaded. Buffers ``t2d`` (bool [V]) and ``d2t`` (int64 offsets [K]) are the vocabulary map: identity
    when K == V, else empty until `attach` or a state dict fills them. A draft that lacks either refuses to compute.

    Args:
        config: a `PEagleConfig`, or a dict in speculators format.

    Raises:
        IncompatibleDraft: the config cannot be used.
    """

    method = "p_eagle"
    config: PEagleConfig
    t2d: Tensor
    d2t: Tensor

    def __init__(self, config: PEagleConfig | Mapping[str, Any]) -> None:
        super().__init__()
        config = config if isinstance(config, PEagleConfig) else PEagleConfig.from_dict(config)
        self.config = config
        hidden = config.hidden_size
        self.embed_tokens = nn.Embedding(
            config.vocab_size, hidden, config.pad_token_id, _weight=torch.zeros(config.vocab_size, hidden)
        )
        self.fc = Linear(LAYERS_READ * hidden, hidden)
        self.mask_hidden = nn.Parameter(torch.randn(1, 1, LAYERS_READ * hidden))
        ordinary = (DecoderLayer(config) for _ in range(config.num_hidden_layers - 1))
        self.layers = nn.ModuleList([FirstLayer(config), *ordinary])
        self.norm = RMSNorm(hidden, config.rms_norm_eps)
        self.lm_head = Linear(hidden, config.draft_vocab_size)
        identity = config.draft_vocab_size == config.vocab_size
        self.register_buffer("t2d", torch.full((config.vocab_size,), identity, dtype=torch.bool))
        self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.int64))
        self.rotary = RotaryEmbedding(config)
        self._has_embedding = self._complete = False
        for module in self.modules():
            if isinstance(module, Linear):
                nn.init.normal_(module.weight, std=config.initializer_range)

    def attach(self, parts: FrozenParts, vocab_map: VocabMap | None = None) -> None:
        """Take the vocabulary map and, unless weights were loaded, a copy of the target's embedding to train on.

        Raises:
            IncompatibleDraft: their sizes are not those of the config.
        """
        expected = (self.config.vocab_size, self.config.hidden_size)
        if tuple(parts.embedding.shape) != expected:
            raise IncompatibleDraft(f"embedding: expected {list(expected)}, found {list(parts.embedding.shape)}")
        if not self._has_embedding:
            with torch.no_grad():
                self.embed_tokens.weight.copy_(parts.embedding)
            self._has_embedding = True
        if vocab_map is None:
            return
        sizes = (self.config.vocab_size, self.config.draft_vocab_size)
        found = (vocab_map.t2d.numel(), vocab_map.d2t.numel())
        if found != sizes:
            raise IncompatibleDraft(f"vocabulary map: expected V, K = {sizes}, found {found}")
        self.t2d.copy_(vocab_map.t2d)
        self.d2t.copy_(vocab_map.d2t)

    def require_complete(self) -> None:
        """Raise `IncompatibleDraft` if the embedding or the vocabulary map was never set."""
        if self._complete:
            return
        if not self._has_embedding:
            raise IncompatibleDraft("the draft has no embedding: expected a copy of the target's; call attach() first")
        if not bool(self.t2d.any()):
            raise IncompatibleDraft(
                "the draft has no vocabulary map: expected its tokens; call attach() with one first"
            )
        self._complete = True

    def serving_state_dict(self) -> dict[str, Tensor]:
        """Return all tensors of the draft; its embedding is its own."""
        return self.state_dict()

    def load_serving_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load what `serving_state_dict` returned.

        Raises:
            IncompatibleDraft: tensors are missing, unknown or misshapen; all of them are named.
        """
        own = self.state_dict()
        faults = [f"missing {name}" for name in own if name not in state]
        faults += [f"unknown {name}" for name in state if name not in own]
        faults += [
            f"{name}: expected {list(own[name].shape)}, found {list(state[name].shape)}"
            for name in own
            if name in state and own[name].shape != state[name].shape
        ]
        if faults:
            raise IncompatibleDraft("draft tensors do not fit the config: " + "; ".join(faults))
        self.load_state_dict(dict(state))
        self._has_embedding = True

    @property
    def target_ids(self) -> Tensor:
        """The target's ids of the draft's tokens, ``[K]`` int64, ascending."""
        return self.d2t + torch.arange(self.d2t.numel(), device=self.d2t.device)

    def layer(self, index: int) -> DecoderLayer:
        """Return a decoder layer."""
        layer = self.layers[index]
        assert isinstance(layer, DecoderLayer)
        return layer

    def embed(self, ids: Tensor) -> Tensor:
        """Return the embedding ``[..., H]`` of token ids (any shape, int64)."""
        return F.embedding(ids, self.embed_tokens.weight, self.config.pad_token_id)

    def project_states(self, states: Tensor) -> Tensor:
        """Return the input state ``[..., H]`` of captured states ``[..., 3 * H]``, low layer to high."""
        projected: Tensor = self.fc(states.to(self.fc.weight.dtype))
        return projected

    def backbone(
        self,
        embedded: Tensor,
        state: Tensor,
        angles: Angles,
        attend: Attend,
        *,
        source: Tensor | None = None,
        checkpointing: bool = False,
    ) -> Tensor:
        """Return the states ``[..., n, H]`` after the last layer, before the final norm.

        Args:
            embedded: ``[..., m, H]`` embeddings of the distinct inputs.
            state: ``[..., m, H]`` input states, as `project_states` returns them.
            angles: of the slots' positions.
            attend: the attention over the slots.
            source: ``[n]``, which of the inputs each slot has; by default slot i has input i. Slots of one input
                differ in their position only, so the first layer projects each input once.
            checkpointing: keep only the states between layers, compute the rest again in the backward pass.
        """
        first = self.layers[0]
        assert isinstance(first, FirstLayer)
        normed = first.hidden_norm(state)
        inputs = torch.cat((first.input_layernorm(embedded.to(state.dtype)), normed), dim=-1)
        query, key, value = first.self_attn.project(inputs)
        state = normed if self.config.norm_before_residual else state
        if source is not None:
            state, query, key, value = (x.index_select(0, source) for x in (state, query, key, value))

        def finish(index: int, state: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            attended = attend(index, rotate(query, *angles), rotate(key, *angles), value)
            return self.layer(index).finish(state, attended)

        def whole(index: int, state: Tensor) -> Tensor:
            layer = self.layer(index)
            return finish(index, state, *layer.self_attn.project(layer.input_layernorm(state)))

        def run(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
            output: Tensor = (
                checkpoint(function, *arguments, use_reentrant=False) if checkpointing else function(*arguments)
            )
            return output

        state = run(finish, 0, state, query, key, value)
        for index in range(1, len(self.layers)):
            state = run(whole, index, state)
        return state
