"""The training-time test written down plainly in eager torch: the yardstick of the benchmarks and an oracle of tests.

Every tensor is materialised: the target's logits, `[B, T, K]` logits and probabilities of each step, and the
`T x (T + k)` scores and mask of the attention. It shares nothing with the fused implementation but the parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from disagg_core.drafts.eagle3 import Eagle3Draft
from disagg_core.drafts.rope import inverse_frequencies


@dataclass
class EagerOutput:
    total: Tensor
    step_losses: Tensor
    correct: Tensor
    denominators: Tensor
    acceptance_rates: Tensor
    logits: list[Tensor]


def shift(x: Tensor) -> Tensor:
    return torch.cat([x[:, 1:], torch.zeros_like(x[:, :1])], dim=1)


def rms_norm(x: Tensor, module: nn.Module) -> Tensor:
    variance = x.float().pow(2).mean(-1, keepdim=True) if x.dtype != torch.float64 else x.pow(2).mean(-1, keepdim=True)
    return module.weight * (x * torch.rsqrt(variance + module.eps)).to(x.dtype)


def rope(x: Tensor, positions: Tensor, draft: Eagle3Draft, seq_len: int) -> Tensor:
    """x [B, heads, T, d]"""
    inv_freq, scaling = inverse_frequencies(draft.config, seq_len)
    angles = positions.to(x.dtype)[:, None] * inv_freq.to(x.device, x.dtype)[None, :]
    angles = torch.cat((angles, angles), dim=-1)
    half = x.shape[-1] // 2
    rotated = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * (angles.cos() * scaling).to(x.dtype) + rotated * (angles.sin() * scaling).to(x.dtype)


def eager_training_time_test(
    draft: Eagle3Draft,
    batch: Mapping[str, Tensor],
    *,
    lm_head: Tensor,
    ttt_length: int,
    mask_mode: Literal["aligned", "compat"] = "aligned",
    normalisation: Literal["valid", "compat"] = "valid",
    loss: str = "soft_cross_entropy",
    step_decay: float = 0.8,
    kl_scale: float = 1.0,
    kl_decay: float = 1.0,
    keep_logits: bool = False,
) -> EagerOutput:
    """Return losses and counts of a batch of unshifted inputs."""
    ids = shift(batch["input_ids"])
    attention_mask = batch["attention_mask"].bool()
    loss_mask = batch["loss_mask"].bool()
    if mask_mode == "aligned":
        loss_mask = shift(shift(loss_mask & attention_mask)) & shift(attention_mask)
    work = torch.float64 if lm_head.dtype == torch.float64 else torch.float32
    target_logits = shift((batch["last_hidden_state"] @ lm_head.T).to(work))
    p = target_logits[..., draft.t2d].softmax(-1)
    p_full = (target_logits[..., draft.t2d] - target_logits.logsumexp(-1, keepdim=True)).exp()
    token = target_logits.argmax(-1)
    del target_logits
    position_mask = (loss_mask & draft.t2d[token]).to(work)
    n = loss_mask.sum().clamp(min=1) if normalisation == "valid" else loss_mask.numel()
    tokens = ids.shape[1]
    mask = torch.full((tokens, tokens), float("-inf"), dtype=work, device=ids.device).triu(1)
    mask = mask + torch.where(attention_mask, 0.0, float("-inf"))[:, None, None, :].to(work)

    state = draft.project_aux(batch["aux_hidden_states"])
    cache: list[tuple[Tensor, Tensor]] = []
    losses, correct, denominators, rates, kept = [], [], [], [], []
    for k in range(ttt_length):
        state = _layer(draft, state, draft.embed_tokens(ids).to(state.dtype), mask, cache, k)
        logits = F.linear(rms_norm(state, draft.norm), draft.lm_head.weight).to(work)
        step_loss = -(position_mask * (p * logits.log_softmax(-1)).sum(-1)).sum() / n
        q = logits.softmax(-1)
        accepted = torch.minimum(p_full, q).sum(-1)
        rate = (accepted * position_mask).sum() / position_mask.sum().clamp(min=1)
        if loss == "lk_alpha":
            log_accepted = accepted.clamp(min=torch.finfo(work).tiny).log()
            step_loss = -(log_accepted * position_mask).sum() / position_mask.sum().clamp(min=1)
        elif loss == "lk_lambda":
            weight = kl_scale * (-kl_decay * rate.detach()).exp()
            step_loss = weight * step_loss + (1 - weight) * (1 - rate)
        guess = logits.argmax(-1)
        losses.append(step_loss)
        correct.append((((guess + draft.d2t[guess]) == token) * position_mask).sum())
        denominators.append(loss_mask.sum())
        rates.append(rate.detach())
        if keep_logits:
            kept.append(logits.detach())
        ids, p, p_full, token = shift(ids), shift(p), shift(p_full), shift(token)
        position_mask, loss_mask = shift(position_mask), shift(loss_mask)
    total = sum(step_decay**k * value for k, value in enumerate(losses))
    return EagerOutput(
        total,
        torch.stack(losses).detach(),
        torch.stack(correct),
        torch.stack(denominators),
        torch.stack(rates),
        kept,
    )


def _layer(
    draft: Eagle3Draft, state: Tensor, embedded: Tensor, mask: Tensor, cache: list[tuple[Tensor, Tensor]], k: int
) -> Tensor:
    layer, config = draft.midlayer, draft.config
    attention = layer.self_attn
    batch, tokens, _ = state.shape
    x = torch.cat((rms_norm(embedded, layer.input_layernorm), rms_norm(state, layer.hidden_norm)), dim=-1)

    def heads(weight: Tensor, count: int) -> Tensor:
        return F.linear(x, weight).view(batch, tokens, count, config.head_dim).transpose(1, 2)

    group = config.num_attention_heads // config.num_key_value_heads
    positions = torch.arange(tokens, device=x.device) + k
    query = rope(heads(attention.q_proj.weight, config.num_attention_heads), positions, draft, tokens + k)
    key = rope(heads(attention.k_proj.weight, config.num_key_value_heads), positions, draft, tokens + k)
    value = heads(attention.v_proj.weight, config.num_key_value_heads)
    cache.append((key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)))
    scale = config.head_dim**-0.5
    scores = query @ cache[0][0].transpose(2, 3) * scale + mask
    for own_key, _ in cache[1:]:
        scores = torch.cat((scores, (query * own_key).sum(-1, keepdim=True) * scale), dim=-1)
    weights = scores.softmax(-1).to(query.dtype)
    attended = weights[..., :tokens] @ cache[0][1]
    for index, (_, own_value) in enumerate(cache[1:]):
        attended = attended + weights[..., tokens + index, None] * own_value
    attended = attended.transpose(1, 2).reshape(batch, tokens, -1)
    state = state + F.linear(attended, attention.o_proj.weight)
    normed = rms_norm(state, layer.post_attention_layernorm)
    mlp = layer.mlp
    gated = F.silu(F.linear(normed, mlp.gate_proj.weight)) * F.linear(normed, mlp.up_proj.weight)
    return state + F.linear(gated, mlp.down_proj.weight)
