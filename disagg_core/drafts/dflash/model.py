"""The DFlash draft: a block of slots that all see the target's states before the block, and each other.

The context is the target's captured states, put together once and the same for every layer; a layer makes keys and
values of it with the same projections as of its own slots. Embedding and LM head are the target's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch.nn.functional as F
from torch import Tensor, nn

from disagg_core.drafts.dflash.config import DFlashConfig
from disagg_core.drafts.layers import RMSNorm, SwiGLU
from disagg_core.drafts.linear import Linear, linear
from disagg_core.drafts.method import DraftModel, FrozenParts
from disagg_core.drafts.rope import RotaryEmbedding, rotate
from disagg_core.drafts.vocab import VocabMap
from disagg_core.errors import IncompatibleDraft

Angles: TypeAlias = tuple[Tensor, Tensor]
"""Cosines and sines of positions, each [..., head_dim]."""
Attend: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Turns a block's queries [..., K, heads, d], keys and values [..., K, kv_heads, d] into [..., K, heads, d]."""


class Attention(nn.Module):
    """The projections of a layer's attention; what sees what is the caller's (training blocks, or decoding)."""

    def __init__(self, config: DFlashConfig) -> None:
        super().__init__()
        self.q_proj = Linear(config.hidden_size, config.num_attention_heads * config.head_dim)
        self.k_proj = Linear(config.hidden_size, config.num_key_value_heads * config.head_dim)
        self.v_proj = Linear(config.hidden_size, config.num_key_value_heads * config.head_dim)
        self.o_proj = Linear(config.num_attention_heads * config.head_dim, config.hidden_size)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self._head_dim = config.head_dim

    def keys(self, x: Tensor, angles: Angles) -> tuple[Tensor, Tensor]:
        """Return rotated keys and values, each ``[..., kv_heads, d]``, of context or normed slots ``[..., H]``."""
        key = rotate(self.k_norm(self._heads(self.k_proj(x))), *angles)
        return key, self._heads(self.v_proj(x))

    def forward(self, x: Tensor, angles: Angles, attend: Attend) -> Tensor:
        """Return the attention's output ``[..., K, H]`` for normed slots ``[..., K, H]``."""
        query = rotate(self.q_norm(self._heads(self.q_proj(x))), *angles)
        output: Tensor = self.o_proj(attend(query, *self.keys(x, angles)).flatten(-2))
        return output

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], x.shape[-1] // self._head_dim, self._head_dim)


class DecoderLayer(nn.Module):
    """Attention and MLP with residuals."""

    def __init__(self, config: DFlashConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def around_attention(self, normed: Tensor, attention: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the attention's output; what a kind of draft does before and after it goes here."""
        return attention(normed)

    def around_mlp(self, normed: Tensor) -> Tensor:
        """Return the MLP's output; what a kind of draft does before and after it goes here."""
        output: Tensor = self.mlp(normed)
        return output

    def attended(self, state: Tensor, angles: Angles, attend: Attend) -> Tensor:
        """Return slots ``[..., K, H]`` after the attention and its residual."""
        return state + self.around_attention(
            self.input_layernorm(state), lambda normed: self.self_attn(normed, angles, attend)
        )

    def finished(self, state: Tensor) -> Tensor:
        """Return the layer's output ``[..., K, H]`` of slots after the attention: MLP and residual."""
        return state + self.around_mlp(self.post_attention_layernorm(state))

    def forward(self, state: Tensor, angles: Angles, attend: Attend) -> Tensor:
        """Return the layer's output ``[..., K, H]`` of slots ``[..., K, H]``."""
        return self.finished(self.attended(state, angles, attend))


class DFlashDraft(DraftModel):
    """A DFlash draft model. Embedding and LM head are not there before `attach`, without which it refuses to compute.

    Args:
        config: a `DFlashConfig`, or a dict in z-lab's format.

    Raises:
        IncompatibleDraft: the config cannot be used.
    """

    method = "dflash"
    config_type: type[DFlashConfig] = DFlashConfig
    layer_type: Callable[[Any], DecoderLayer] = DecoderLayer
    config: DFlashConfig
    embed_tokens: nn.Parameter | None  # [V, H]
    lm_head: nn.Parameter | None  # [V, H]

    def __init__(self, config: DFlashConfig | Mapping[str, Any]) -> None:
        super().__init__()
        config = config if isinstance(config, DFlashConfig) else self.config_type.from_dict(config)
        self.config = config
        hidden = config.hidden_size
        self.fc = Linear(len(config.target_layer_ids) * hidden, hidden)
        self.hidden_norm = RMSNorm(hidden, config.rms_norm_eps)
        self.layers = nn.ModuleList(self.layer_type(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(hidden, config.rms_norm_eps)
        self.rotary = RotaryEmbedding(config)
        self.register_parameter("embed_tokens", None)
        self.register_parameter("lm_head", None)
        self.embedding_scale = config.input_embedding_scale or 1.0  # factor on the attached embedding
        self.head_scale = 1.0  # factor that the attached head holds and the one that an engine gives the draft does not
        self.add_parts()
        self.reset_parameters()

    def add_parts(self) -> None:
        """Make what a kind of draft has besides."""

    def reset_parameters(self) -> None:
        """Draw fresh weights: normal with `initializer_range`."""
        for module in self.modules():
            if isinstance(module, Linear):
                nn.init.normal_(module.weight, std=self.config.initializer_range)

    def attach(self, parts: FrozenParts, vocab_map: VocabMap | None = None) -> None:
        """Use the target's embedding and LM head, without a copy; a vocabulary map must be the whole vocabulary's.

        Raises:
            IncompatibleDraft: they have other sizes than the config says.
        """
        size, width = self.config.vocab_size, self.config.hidden_size
        found = {"embedding": tuple(parts.embedding.shape), "LM head": tuple(parts.lm_head.shape)}
        faults = [
            f"{name}: expected [V, H] = {(size, width)}, found {shape}"
            for name, shape in found.items()
            if shape != (size, width)
        ]
        if vocab_map is not None and vocab_map.d2t.numel() != size:
            faults.append(f"vocabulary map: expected all {size} tokens, found {vocab_map.d2t.numel()}")
        if faults:
            raise IncompatibleDraft(f"the target's parts do not fit the draft: {'; '.join(faults)}")
        self.embed_tokens = nn.Parameter(parts.embedding.detach(), requires_grad=False)
        shared = parts.lm_head is parts.embedding
        self.lm_head = self.embed_tokens if shared else nn.Parameter(parts.lm_head.detach(), requires_grad=False)
        self.head_scale = parts.logit_scale
        if self.config.input_embedding_scale is None:
            self.embedding_scale = parts.embedding_scale

    def serving_state_dict(self) -> dict[str, Tensor]:
        """Return the draft's own tensors by serving name; nothing of the target."""
        own = own_shapes(self)
        return {name: tensor for name, tensor in self.state_dict().items() if name in own}

    def load_serving_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load what `serving_state_dict` returned.

        Raises:
            IncompatibleDraft: tensors are missing, unknown or misshapen; all of them are named.
        """
        expected = own_shapes(self)
        faults = [f"missing {name}" for name in expected if name not in state]
        faults += [f"unknown {name}" for name in state if name not in expected]
        faults += [
            f"{name}: expected {list(shape)}, found {list(state[name].shape)}"
            for name, shape in expected.items()
            if name in state and tuple(state[name].shape) != shape
        ]
        if faults:
            raise IncompatibleDraft("draft tensors do not fit the config: " + "; ".join(faults))
        self.load_state_dict(dict(state), strict=False)

    def context(self, states: Tensor) -> Tensor:
        """Return the context ``[..., H]`` of captured states ``[..., C * H]``, low layer to high."""
        context: Tensor = self.hidden_norm(self.fc(states.to(self.fc.weight.dtype)))
        return context

    def embed(self, ids: Tensor) -> Tensor:
        """Return the target's embedding ``[..., H]`` of token ids (any shape, int64), as an engine gives it.

        Raises:
            IncompatibleDraft: nothing is attached.
        """
        if self.embed_tokens is None:
            raise IncompatibleDraft(
                "the draft has no embedding: expected the target's, found none; call attach() first"
            )
        return F.embedding(ids, self.embed_tokens).to(self.fc.weight.dtype) * self.embedding_scale

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits ``[..., V]`` of states after the final norm ``[..., H]``.

        Raises:
            IncompatibleDraft: nothing is attached.
        """
        return capped(linear(hidden, self.attached_head().to(hidden.dtype)) / self.head_scale, self.config)

    def attached_head(self) -> Tensor:
        """Return the target's LM head ``[V, H]``.

        Raises:
            IncompatibleDraft: nothing is attached.
        """
        if self.lm_head is None:
            raise IncompatibleDraft("the draft has no LM head: it is the target's; call attach() first")
        return self.lm_head


def capped(logits: Tensor, config: DFlashConfig) -> Tensor:
    """Return `logits` with the config's multiplier and soft cap."""
    if config.output_multiplier != 1.0:
        logits = logits * config.output_multiplier
    if config.final_logit_softcapping is not None:
        logits = (logits / config.final_logit_softcapping).tanh() * config.final_logit_softcapping
    return logits


def own_shapes(draft: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return name and shape of each of the draft's own tensors: all its parameters but the target's."""
    return {name: tuple(p.shape) for name, p in draft.named_parameters() if name not in ("embed_tokens", "lm_head")}
