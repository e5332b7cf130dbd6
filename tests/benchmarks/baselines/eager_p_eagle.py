"""P-EAGLE's training step written down plainly in eager torch: the yardstick of the benchmark and an oracle of tests.

Every tensor is materialised: the mask over all rows, `[R, R]` scores of every head, `[R, V]` teacher and `[R, K]` draft
logits. It shares nothing with the fused implementation but the parameters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from disagg_core.drafts.p_eagle.model import DecoderLayer, PEagleDraft


@dataclass
class EagerOutput:
    loss: Tensor
    loss_num: Tensor
    logits: Tensor  # [R, K]
    position_mask: Tensor  # [R]
    correct: Tensor  # [D]
    counted: Tensor  # [D]


def eager_p_eagle(draft: PEagleDraft, inputs: Mapping[str, Tensor]) -> EagerOutput:
    """Inputs as those of `disagg_core.drafts.p_eagle.loss.parallel_depths`."""
    anchors, depths = inputs["anchor_pos"], inputs["depth"]
    places = anchors + depths
    real = (depths == 0)[:, None]
    ids = torch.where(real[:, 0], inputs["input_ids"][0, places], draft.config.mask_token_id)
    states = torch.where(real, inputs["hidden_states"][0, places], draft.mask_hidden[0])
    visible = dense_mask(anchors, depths, inputs["lengths"], inputs["input_ids"].shape[1], draft.config.sliding_window)
    state = F.linear(states, draft.fc.weight)
    for index in range(draft.config.num_hidden_layers):
        layer = draft.layer(index)
        x = rms_norm(state, layer.hidden_norm if index == 0 else layer.input_layernorm)
        if index == 0:
            embedded = F.embedding(ids, draft.embed_tokens.weight, draft.config.pad_token_id)
            x = torch.cat((rms_norm(embedded, layer.input_layernorm), x), dim=-1)
        state = state + attention(draft, layer, x, places, visible)
        y = rms_norm(state, layer.post_attention_layernorm)
        gated = F.silu(F.linear(y, layer.mlp.gate_proj.weight)) * F.linear(y, layer.mlp.up_proj.weight)
        state = state + F.linear(gated, layer.mlp.down_proj.weight)
    logits = F.linear(rms_norm(state, draft.norm), draft.lm_head.weight)
    return finish(draft, inputs, logits, places)


def finish(draft: PEagleDraft, inputs: Mapping[str, Tensor], logits: Tensor, places: Tensor) -> EagerOutput:
    teacher = inputs["target_logits"][0, places]
    counted = (inputs["loss_mask"][0, places] != 0) & draft.t2d[teacher.argmax(-1)]
    p = teacher[:, draft.t2d].softmax(-1)
    cross_entropy = -(p * logits.log_softmax(-1)).sum(-1) * counted
    right = (logits.argmax(-1) == p.argmax(-1)) & counted
    by_depth = F.one_hot(inputs["depth"], draft.config.depths).T.float()
    total = cross_entropy.sum()
    return EagerOutput(
        loss=total / counted.sum().clamp(min=1),
        loss_num=total,
        logits=logits,
        position_mask=counted,
        correct=by_depth @ right.float(),
        counted=by_depth @ counted.float(),
    )


def dense_mask(anchors: Tensor, depths: Tensor, lengths: Tensor, tokens: int, window: int | None) -> Tensor:
    """Which row sees which, bool [R, R]."""
    document = torch.full((tokens,), -1)
    document[: int(lengths.sum())] = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    mine, theirs = document[anchors][:, None], document[anchors][None, :]
    a, b, d, e = anchors[:, None], anchors[None, :], depths[:, None], depths[None, :]
    context = (e == 0) & (b <= a)
    if window is not None:
        context &= b > a + d - window
    return (mine == theirs) & (mine >= 0) & (context | ((a == b) & (e <= d)))


def attention(draft: PEagleDraft, layer: DecoderLayer, x: Tensor, places: Tensor, visible: Tensor) -> Tensor:
    config, module = draft.config, layer.self_attn
    rows, dim = len(x), config.head_dim
    inverse = config.rope_parameters["rope_theta"] ** (-torch.arange(0, dim, 2, dtype=x.dtype) / dim)
    angles = (places[:, None].to(x.dtype) * inverse).repeat(1, 2)[:, None, :]

    def rope(y: Tensor) -> Tensor:
        low, high = y.chunk(2, dim=-1)
        return y * angles.cos() + torch.cat((-high, low), dim=-1) * angles.sin()

    query = rope(F.linear(x, module.q_proj.weight).view(rows, -1, dim))
    key = rope(F.linear(x, module.k_proj.weight).view(rows, -1, dim))
    value = F.linear(x, module.v_proj.weight).view(rows, -1, dim)
    group = config.num_attention_heads // config.num_key_value_heads
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", query, key) / math.sqrt(dim)
    weights = scores.masked_fill(~visible, torch.finfo(x.dtype).min).softmax(-1) * visible
    return F.linear(torch.einsum("hqk,khd->qhd", weights, value).flatten(1), module.o_proj.weight)


def rms_norm(x: Tensor, module: torch.nn.Module) -> Tensor:
    return module.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + module.eps)
