"""Small P-EAGLE drafts and packed rows for their tests."""

from __future__ import annotations

import torch
from torch import Tensor

from disagg_core.drafts.method import FrozenParts
from disagg_core.drafts.p_eagle.config import PEagleConfig
from disagg_core.drafts.p_eagle.model import PEagleDraft
from disagg_core.drafts.p_eagle.sampling import sample_rows
from disagg_core.drafts.vocab import VocabMap


def small_config(**changes: object) -> PEagleConfig:
    """A plain config; 5 depths, a reduced vocabulary, grouped heads of another width than the hidden size suggests."""
    values: dict[str, object] = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "vocab_size": 40,
        "draft_vocab_size": 24,
        "max_position_embeddings": 256,
        "rope_theta": 5000.0,
        "depths": 5,
        "mask_token_id": 39,
        "pad_token_id": 3,
        "aux_layer_ids": [0, 2, 4],
    }
    return PEagleConfig.from_dict(values | changes)


def small_draft(seed: int = 0, dtype: torch.dtype = torch.float32, **changes: object) -> PEagleDraft:
    """Weights large enough that attention, teacher and draft have shape; norms away from 1."""
    generator = torch.Generator().manual_seed(seed)
    draft = PEagleDraft(small_config(**changes)).to(dtype)
    config = draft.config
    counts = torch.rand(config.vocab_size, generator=generator)
    parts = FrozenParts(*torch.zeros(2, config.vocab_size, config.hidden_size))
    draft.attach(parts, VocabMap.from_counts(counts, config.draft_vocab_size))
    with torch.no_grad():
        for name, parameter in draft.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(1 + 0.1 * noise if "norm" in name else 0.3 * noise)
    return draft


def packed_inputs(draft: PEagleDraft, lengths: list[int], *, tokens: int, seed: int = 1) -> dict[str, Tensor]:
    """Sequences of these `lengths` in one row of `tokens`, with rows of every depth drawn for each of them."""
    config, generator = draft.config, torch.Generator().manual_seed(seed)
    dtype = draft.fc.weight.dtype
    loss_mask = (torch.rand(1, tokens, generator=generator) < 0.8).long()
    loss_mask[0, sum(lengths) :] = 0
    anchors, depths, start = [torch.arange(tokens)], [torch.zeros(tokens, dtype=torch.int64)], 0
    for length in lengths:
        rows = sample_rows(loss_mask[0, start : start + length], config.depths, 0.8, 0.2, generator)
        anchors.append(rows.anchors[rows.depths > 0] + start)
        depths.append(rows.depths[rows.depths > 0])
        start += length
    order = torch.argsort(torch.cat(depths), stable=True)
    return {
        "input_ids": torch.randint(0, config.vocab_size - 1, (1, tokens), generator=generator),
        "loss_mask": loss_mask,
        "hidden_states": torch.randn(1, tokens, 3 * config.hidden_size, generator=generator).to(dtype),
        "target_logits": 2 * torch.randn(1, tokens, config.vocab_size, generator=generator).to(dtype),
        "lengths": torch.tensor(lengths),
        "anchor_pos": torch.cat(anchors)[order],
        "depth": torch.cat(depths)[order],
    }


def gradients(draft: PEagleDraft, loss: Tensor) -> dict[str, Tensor]:
    draft.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in draft.named_parameters() if p.grad is not None}


def worst_gradient(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest relative norm of a difference."""
    assert found.keys() == expected.keys()
    return max(float((found[n] - expected[n]).norm() / expected[n].norm().clamp(min=1e-7)) for n in expected)
