"""Small drafts and batches for the tests of the EAGLE-3 draft."""

from __future__ import annotations

import torch
from torch import Tensor

from disagg_core.drafts.eagle3 import Eagle3Config, Eagle3Draft
from disagg_core.drafts.vocab import VocabMap


def small_config(**changes: object) -> Eagle3Config:
    values: dict[str, object] = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "vocab_size": 40,
        "draft_vocab_size": 24,
        "max_position_embeddings": 64,
    }
    return Eagle3Config.from_dict(values | changes)


def small_draft(seed: int = 0, dtype: torch.dtype = torch.float32, **changes: object) -> Eagle3Draft:
    """Weights large enough that attention, teacher and draft have shape."""
    generator = torch.Generator().manual_seed(seed)
    draft = Eagle3Draft(small_config(**changes)).to(dtype)
    with torch.no_grad():
        for name, parameter in draft.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(1 + 0.1 * noise if "norm" in name else 0.3 * noise)
    config = draft.config
    if config.draft_vocab_size != config.vocab_size:
        draft.set_vocab_map(
            VocabMap.from_counts(torch.rand(config.vocab_size, generator=generator), config.draft_vocab_size)
        )
    return draft


def small_batch(
    draft: Eagle3Draft,
    lengths: list[int],
    *,
    width: int | None = None,
    seed: int = 1,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Right-padded samples; the content of a sample depends on its place and the seed, not on the padding."""
    config, width = draft.config, width or max(lengths)
    target = config.target_hidden_size
    batch = {
        "input_ids": torch.zeros(len(lengths), width, dtype=torch.int64),
        "attention_mask": torch.zeros(len(lengths), width, dtype=torch.int64),
        "loss_mask": torch.zeros(len(lengths), width, dtype=torch.int64),
        "aux_hidden_states": torch.zeros(len(lengths), width, 3 * target, dtype=dtype),
        "last_hidden_state": torch.zeros(len(lengths), width, target, dtype=dtype),
    }
    for row, length in enumerate(lengths):
        generator = torch.Generator().manual_seed(1000 * seed + row)
        batch["input_ids"][row, :length] = torch.randint(0, config.vocab_size, (length,), generator=generator)
        batch["attention_mask"][row, :length] = 1
        batch["loss_mask"][row, :length] = (torch.rand(length, generator=generator) < 0.6).long()
        for name in ("aux_hidden_states", "last_hidden_state"):
            batch[name][row, :length] = torch.randn(batch[name][row, :length].shape, generator=generator).to(dtype)
    return batch


def target_head(draft: Eagle3Draft, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    shape = (draft.config.vocab_size, draft.config.target_hidden_size)
    return torch.randn(shape, generator=generator).to(dtype) * 0.7


def gradients(draft: Eagle3Draft, total: Tensor) -> dict[str, Tensor]:
    draft.zero_grad()
    total.backward()
    return {name: p.grad.clone() for name, p in draft.named_parameters() if p.grad is not None}


def worst_gradient(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest relative norm of a difference."""
    assert found.keys() == expected.keys()
    return max(float((found[n] - expected[n]).norm() / expected[n].norm().clamp(min=1e-12)) for n in expected)
