"""Small DFlash drafts, targets' parts and batches for the tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from disagg_core.contracts import Capture
from disagg_core.drafts.dflash import DFlashConfig, DFlashDraft
from disagg_core.drafts.dflash.anchors import draw_anchors, stacked
from disagg_core.drafts.method import FrozenParts, Sample
from disagg_core.target.facts import TargetFacts

HIDDEN, VOCAB, BLOCK = 16, 40, 4


def small_config(config_type: type[DFlashConfig] = DFlashConfig, **changes: object) -> Any:
    values: dict[str, object] = {
        "hidden_size": HIDDEN,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "vocab_size": VOCAB,
        "max_position_embeddings": 128,
        "block_size": BLOCK,
        "mask_token_id": VOCAB - 1,
        "target_layer_ids": [1, 3],
        "num_target_layers": 6,
    }
    return config_type.from_dict(values | changes)


SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 6}
WINDOWS_BOTH_WAYS = {"layer_types": ["sliding_attention"] * 2, "sliding_window": 5, "is_causal": False}
CAPPED = {"output_multiplier": 0.5, "final_logit_softcapping": 3.0, "input_embedding_scale": 2.0}
KINDS = {"full": {}, "sliding": SLIDING, "window both ways": WINDOWS_BOTH_WAYS, "capped": CAPPED}


def filled(draft: DFlashDraft, seed: int = 0) -> DFlashDraft:
    """Give every tensor weights that are large enough for everything to show in the logits."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in draft.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(1 + 0.1 * noise if "norm" in name else 0.3 * noise)
    return draft


def target_parts(config: DFlashConfig, dtype: torch.dtype = torch.float32) -> FrozenParts:
    generator = torch.Generator().manual_seed(7)
    shape = (2, config.vocab_size, config.hidden_size)
    embedding, head = torch.randn(shape, generator=generator).to(dtype) * 0.7
    return FrozenParts(embedding, head)


def small_draft(dtype: torch.dtype = torch.float32, seed: int = 0, **changes: object) -> DFlashDraft:
    draft = filled(DFlashDraft(small_config(**changes)), seed).to(dtype)
    draft.attach(target_parts(draft.config, dtype))
    return draft


def small_batch(
    config: DFlashConfig,
    lengths: list[int],
    *,
    anchors: int = 5,
    width: int | None = None,
    seed: int = 1,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Right-padded samples with holes in their masks; a sample depends on its place and the seed, not on padding."""
    width = width or max(lengths)
    states = len(config.target_layer_ids) * config.hidden_size
    batch = {
        "input_ids": torch.zeros(len(lengths), width, dtype=torch.int64),
        "loss_mask": torch.zeros(len(lengths), width, dtype=torch.int64),
        "hidden_states": torch.zeros(len(lengths), width, states, dtype=dtype),
        "last_hidden_state": torch.zeros(len(lengths), width, config.hidden_size, dtype=dtype),
    }
    found = []
    for row, length in enumerate(lengths):
        generator = torch.Generator().manual_seed(1000 * seed + row)
        batch["input_ids"][row, :length] = torch.randint(0, config.vocab_size - 1, (length,), generator=generator)
        batch["loss_mask"][row, :length] = (torch.rand(length, generator=generator) < 0.75).long()
        for name in ("hidden_states", "last_hidden_state"):
            batch[name][row, :length] = torch.randn(batch[name][row, :length].shape, generator=generator).to(dtype)
        found.append(draw_anchors(batch["loss_mask"][row], anchors, generator))
    batch["anchors"], batch["block_keep"] = stacked(found)
    return batch


def blocks_of(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"anchors": batch["anchors"], "block_keep": batch["block_keep"]}


def gradients(draft: torch.nn.Module, total: Tensor) -> dict[str, Tensor]:
    draft.zero_grad()
    total.backward()
    return {name: p.grad.clone() for name, p in draft.named_parameters() if p.grad is not None}


def worst_gradient(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest relative norm of a difference."""
    assert found.keys() == expected.keys()
    return max(float((found[n] - expected[n]).norm() / expected[n].norm().clamp(min=1e-12)) for n in expected)


def some_samples(config: DFlashConfig, lengths: list[int], seed: int = 3) -> list[Sample]:
    batch = small_batch(config, lengths, seed=seed)
    return [
        Sample(
            f"s{row:09d}",
            {
                "input_ids": batch["input_ids"][row, :length].int(),
                "loss_mask": batch["loss_mask"][row, :length].to(torch.uint8),
                "aux_hidden_states": batch["hidden_states"][row, :length],
                "last_hidden_state": batch["last_hidden_state"][row, :length],
            },
        )
        for row, length in enumerate(lengths)
    ]


def some_facts(**changes: object) -> TargetFacts:
    """A target of Qwen3-8B's make, but small."""
    values: dict[str, Any] = {
        "model": "./target",
        "model_type": "qwen3",
        "hidden_size": HIDDEN,
        "intermediate_size": 24,
        "num_layers": 36,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "vocab_size": VOCAB,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_ids": (1,),
        "pad_token_id": 2,
        "dtype": "float32",
        "aux_layers": (1, 2, 3),
        "version": "1",
    }
    return TargetFacts(**values | changes)


CAPTURE = Capture((1, 9, 17, 25, 33), last_hidden_state=False)
