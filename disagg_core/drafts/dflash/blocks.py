"""The draft's part of a training step: all blocks of a batch through all layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from disagg_core.drafts.dflash.attention import AttentionKernel, BlockAttention
from disagg_core.drafts.dflash.batch import BlockPlan
from disagg_core.drafts.dflash.config import LayerMask
from disagg_core.drafts.dflash.model import Angles, DecoderLayer, DFlashDraft

_MLP_BYTES = {"cpu": 2 * 1024**2, "cuda": 1024**3}
"""Bytes of one slice's activations of the MLP's inner width."""
_KEEP: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}


def run_blocks(
    draft: DFlashDraft,
    hidden_states: Tensor,
    plan: BlockPlan,
    masks: Sequence[LayerMask],
    kernel: AttentionKernel,
    *,
    checkpointing: bool,
) -> Tensor:
    """Return the slots' states after the final norm, ``[M, K, H]``.

    Args:
        draft: with the target's parts.
        hidden_states: the captured states, ``[batch, tokens, C * H]``, packed ``[1, tokens of all, C * H]``; where
            ranks share the batch, those of this rank's context rows.
        plan: the batch's blocks.
        masks: what the slots of each layer see.
        kernel: of the attention.
        checkpointing: keep only the states between attentions and MLPs, compute the rest again in the backward pass.
    """
    context = draft.context(hidden_states.flatten(0, 1)[plan.context_flat])
    state = draft.embed(plan.tokens)
    longest = plan.longest + plan.block_size
    far = draft.rotary(plan.context_positions, longest, state.dtype)
    near = draft.rotary(plan.positions, longest, state.dtype)
    attention = BlockAttention(plan, kernel)
    for layer, mask in zip(draft.layers, masks, strict=True):
        assert isinstance(layer, DecoderLayer)
        arguments = (layer, attention, mask, state, context, near, far)
        if checkpointing:
            state = _finished_in_slices(layer, checkpoint(_attended, *arguments, **_KEEP))
        else:
            state = layer.finished(_attended(*arguments))
    normed: Tensor = draft.norm(state)
    return normed


def _finished_in_slices(layer: DecoderLayer, state: Tensor) -> Tensor:
    """Return `DecoderLayer.finished` of ``[M, K, H]``, which looks at each block alone, a few blocks at a time."""
    inner = layer.mlp.gate_proj.out_features
    per_block = state.element_size() * state.shape[1] * inner
    parts = torch.split(state, max(1, _MLP_BYTES[state.device.type] // per_block))
    return torch.cat([checkpoint(layer.finished, part, **_KEEP) for part in parts])


def _attended(
    layer: DecoderLayer,
    attention: BlockAttention,
    mask: LayerMask,
    state: Tensor,
    context: Tensor,
    near: Angles,
    far: Angles,
) -> Tensor:
    seen = attention.whole(*layer.self_attn.keys(context, far))

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attention(mask, query, (key, value), seen)

    return layer.attended(state, near, attend)
