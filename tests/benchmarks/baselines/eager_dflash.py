"""The steps of DFlash and DFlash2 written down plainly in eager torch: the yardstick of benchmarks, an oracle of tests.

Every tensor is materialised: a dense mask of all slots by context and all slots, the scores of the attention under it,
and the logits of all slots. It shares nothing with the fused implementation but the parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from disagg_core.drafts.dflash.config import LayerMask
from disagg_core.drafts.dflash.model import DecoderLayer, DFlashDraft
from disagg_core.drafts.dflash2.model import DFlash2Draft, DFlash2Layer, GroupedDynamicCausalConv
from disagg_core.drafts.rope import inverse_frequencies


@dataclass
class EagerOutput:
    loss: Tensor
    ce: Tensor
    weights: Tensor
    mask: Tensor
    predicted: Tensor
    hidden: Tensor


def rms_norm(x: Tensor, module: nn.Module) -> Tensor:
    return module.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + module.eps))


def rope(x: Tensor, positions: Tensor, draft: DFlashDraft) -> Tensor:
    """x [B, T, heads, d], positions [B, T]"""
    inv_freq, scaling = inverse_frequencies(draft.config, 0)
    angles = positions.to(x.dtype)[..., None] * inv_freq.to(x.dtype)
    angles = torch.cat((angles, angles), dim=-1)[:, :, None]
    half = x.shape[-1] // 2
    rotated = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * angles.cos() * scaling + rotated * angles.sin() * scaling


def dense_mask(anchors: Tensor, keep: Tensor, tokens: int, size: int, mask: LayerMask) -> Tensor:
    """Return bool [B, N * K, tokens + N * K], True where a slot sees."""
    batch, blocks = anchors.shape
    anchor = anchors.repeat_interleave(size, 1)[:, :, None]
    slot = torch.arange(size).repeat(blocks)
    block = torch.arange(blocks).repeat_interleave(size)
    context = torch.arange(tokens)[None, None]
    far = context < anchor
    if mask.window is not None and mask.by_anchor:
        far = far & (context >= anchor - mask.window)
    elif mask.window is not None:
        far = far & (context > anchor + slot[None, :, None] - mask.window)
    near = block[:, None] == block[None]
    if mask.causal:
        near = near & (slot[None] <= slot[:, None])
    near = near[None].expand(batch, -1, -1)
    return torch.cat((far, near), dim=-1) & keep.repeat_interleave(size, 1)[:, :, None]


@dataclass
class EagerBlocks:
    """What every slot [B, N, K] is and sees."""

    keep: Tensor
    positions: Tensor
    inside: Tensor  # the positions, those beyond the end moved to it
    own: Tensor  # the slots' own tokens
    hidden: Tensor  # [B, N, K, H] after the final norm

    def at_slots(self, values: Tensor, ahead: int = 0) -> Tensor:
        """Return values [B, T, ...] at the slots' positions, or further on, as [B, N, K, ...]."""
        batch, blocks, size = self.positions.shape
        places = (self.positions + ahead).clamp(max=values.shape[1] - 1).flatten(1)
        return values[torch.arange(batch)[:, None], places].unflatten(1, (blocks, size))


def eager_blocks(draft: DFlashDraft, inputs: Mapping[str, Tensor], *, by_anchor: bool = False) -> EagerBlocks:
    config, size = draft.config, draft.config.block_size
    ids, states, anchors, keep = (inputs[name] for name in ("input_ids", "hidden_states", "anchors", "block_keep"))
    batch, tokens = ids.shape
    blocks = anchors.shape[1]
    positions = anchors[:, :, None] + torch.arange(size)
    inside = positions.clamp(max=tokens - 1)
    own = ids[:, :, None].expand(-1, -1, size).gather(1, inside)
    block_ids = torch.full_like(own, config.mask_token_id)
    block_ids[:, :, 0] = torch.where(keep, own[:, :, 0], config.mask_token_id)
    context = rms_norm(F.linear(states, draft.fc.weight), draft.hidden_norm)
    state = F.embedding(block_ids.flatten(1), draft.embed_tokens) * draft.embedding_scale
    at = torch.cat((torch.arange(tokens).expand(batch, -1), positions.flatten(1)), dim=1)
    for layer, kind in zip(draft.layers, config.layer_masks, strict=True):
        seen = dense_mask(anchors, keep, tokens, size, kind._replace(by_anchor=by_anchor))
        state = _layer(draft, layer, state, context, at, seen)
    hidden = rms_norm(state, draft.norm).view(batch, blocks, size, -1)
    return EagerBlocks(keep, positions, inside, own, hidden)


def eager_dflash(
    draft: DFlashDraft,
    inputs: Mapping[str, Tensor],
    *,
    gamma: float | None = None,
    by_anchor: bool = False,
) -> EagerOutput:
    """Return the loss of type dflash, with what it was made of for every slot [B, N, K].

    Of a DFlash2 draft the selector's loss is added; a label that is no candidate takes the last one's place.
    """
    config, size = draft.config, draft.config.block_size
    blocks = eager_blocks(draft, inputs, by_anchor=by_anchor)
    logits = F.linear(blocks.hidden, draft.lm_head) * config.output_multiplier
    if config.final_logit_softcapping is not None:
        logits = config.final_logit_softcapping * torch.tanh(logits / config.final_logit_softcapping)
    mask = (
        blocks.keep[:, :, None]
        & (blocks.positions < inputs["input_ids"].shape[1])
        & (torch.arange(size) > 0)
        & (inputs["loss_mask"] != 0)[:, :, None].expand(-1, -1, size).gather(1, blocks.inside)
    ).to(logits.dtype)
    ce = -logits.log_softmax(-1).gather(3, blocks.own[..., None]).squeeze(3)
    slots = torch.arange(size).to(logits.dtype)
    weights = mask if gamma is None else mask * torch.exp(-(slots - 1) / gamma)
    loss = (weights * ce).sum() / weights.sum()
    if isinstance(draft, DFlash2Draft):
        loss = loss + (weights * _selector_ce(draft, blocks, logits)).sum() / weights.sum()
    return EagerOutput(loss, ce.detach(), weights, mask, logits.argmax(-1), blocks.hidden)


def _selector_ce(draft: DFlash2Draft, blocks: EagerBlocks, logits: Tensor) -> Tensor:
    """Return the cross entropy of each slot over its candidates, with the label before it as predecessor."""
    selector, label = draft.candidate_selector, blocks.own[..., None]
    ids = logits.topk(draft.config.selector_top_k).indices
    found = (ids == label).any(-1, keepdim=True)
    ids = torch.cat((ids[..., :-1], torch.where(found, ids[..., -1:], label)), dim=-1)
    before = F.pad(blocks.own[..., :-1], (1, 0))
    gate = selector.predecessor_codebook[before] * F.linear(blocks.hidden, selector.hidden_projection.weight)
    scores = logits.gather(3, ids) + (selector.successor_codebook[ids] * gate[..., None, :]).sum(-1)
    return -scores.log_softmax(-1).gather(3, (ids == label).int().argmax(-1, keepdim=True)).squeeze(3)


def _layer(
    draft: DFlashDraft, layer: DecoderLayer, state: Tensor, context: Tensor, positions: Tensor, seen: Tensor
) -> Tensor:
    mlp, size = layer.mlp, draft.config.block_size

    def attention(x: Tensor) -> Tensor:
        return _attention(draft, layer, x, context, positions, seen)

    def feed_forward(x: Tensor) -> Tensor:
        gated = F.silu(F.linear(x, mlp.gate_proj.weight)) * F.linear(x, mlp.up_proj.weight)
        return F.linear(gated, mlp.down_proj.weight)

    if isinstance(layer, DFlash2Layer):
        attention = _between_convolutions(layer.attention_conv, attention, size)
        feed_forward = _between_convolutions(layer.mlp_conv, feed_forward, size)
    state = state + attention(rms_norm(state, layer.input_layernorm))
    return state + feed_forward(rms_norm(state, layer.post_attention_layernorm))


def _between_convolutions(
    conv: GroupedDynamicCausalConv, sublayer: Callable[[Tensor], Tensor], size: int
) -> Callable[[Tensor], Tensor]:
    """Return `sublayer` with a convolution over each block's slots before and after it."""
    taps, width = conv.base_kernel.shape[1:]

    def convolved(x: Tensor, kernels: Tensor) -> Tensor:
        """x [B, N * K, H], kernels [B, N, K, taps, H]"""
        blocks = x.unflatten(1, (-1, size))
        shifted = [F.pad(blocks, (0, 0, tap, 0))[:, :, :size] for tap in range(taps)]
        return (torch.stack(shifted, dim=3) * kernels).sum(3).flatten(1, 2)

    def whole(normed: Tensor) -> Tensor:
        corrections = F.linear(normed, conv.kernel_projection.weight).unflatten(1, (-1, size))
        corrections = corrections.unflatten(-1, (2, taps, -1))
        corrections = corrections.repeat_interleave(width // corrections.shape[-1], dim=-1)
        before, after = (conv.base_kernel + corrections).unbind(3)
        return convolved(sublayer(convolved(normed, before)), after)

    return whole


def _attention(
    draft: DFlashDraft, layer: DecoderLayer, normed: Tensor, context: Tensor, positions: Tensor, seen: Tensor
) -> Tensor:
    config, attention = draft.config, layer.self_attn
    batch, slots = normed.shape[:2]
    both = torch.cat((context, normed), dim=1)

    def heads(x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight).view(batch, x.shape[1], -1, config.head_dim)

    query = rope(rms_norm(heads(normed, attention.q_proj.weight), attention.q_norm), positions[:, -slots:], draft)
    key = rope(rms_norm(heads(both, attention.k_proj.weight), attention.k_norm), positions, draft)
    value = heads(both, attention.v_proj.weight)
    group = config.num_attention_heads // config.num_key_value_heads
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = query @ key.transpose(2, 3) * config.head_dim**-0.5
    scores = scores.masked_fill(~seen[:, None], torch.finfo(scores.dtype).min)
    attended = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
    attended = attended * seen.any(-1, keepdim=True)
    return F.linear(attended, attention.o_proj.weight)
