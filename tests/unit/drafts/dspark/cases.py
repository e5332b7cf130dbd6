"""Small DSpark drafts and batches for the tests, and the loss written plainly, block by block."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from disagg_core.drafts.dflash.drafter import ContextCache, draft_block
from disagg_core.drafts.dspark import DSparkConfig, DSparkDraft
from disagg_core.drafts.method import FrozenParts

HIDDEN, VOCAB, BLOCK, TOKENS = 16, 40, 4, 18
HEADS: dict[str, dict[str, Any]] = {
    "vanilla": {},
    "gated": {"markov_head_type": "gated"},
    "rnn": {"markov_head_type": "rnn"},
    "unaware confidence": {"confidence_head_with_markov": False},
    "no confidence": {"enable_confidence_head": False},
}


def small_document(**changes: Any) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3DSparkModel"],
        "hidden_size": HIDDEN,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "vocab_size": VOCAB,
        "max_position_embeddings": 128,
        "rope_theta": 10000.0,
        "block_size": BLOCK,
        "mask_token_id": VOCAB - 1,
        "target_layer_ids": [1, 3],
        "num_target_layers": 6,
        "markov_rank": 5,
    } | changes


def small_draft(dtype: torch.dtype = torch.float32, **changes: Any) -> DSparkDraft:
    """A draft all of whose weights are large enough to show."""
    draft = DSparkDraft(DSparkConfig.from_dict(small_document(**changes)))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in draft.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(1 + 0.1 * noise if "norm" in name else 0.3 * noise)
    draft = draft.to(dtype)
    embedding, head = (0.7 * torch.randn(2, VOCAB, HIDDEN, generator=generator)).to(dtype)
    draft.attach(FrozenParts(embedding, head))
    return draft


def small_batch(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Two samples, the first with a hole in its mask, the second shorter than the batch."""
    generator = torch.Generator().manual_seed(5)
    mask = torch.ones(2, TOKENS, dtype=torch.int64)
    mask[0, 9] = 0
    mask[1, 12:] = 0
    return {
        "input_ids": torch.randint(0, VOCAB - 1, (2, TOKENS), generator=generator),
        "loss_mask": mask,
        "hidden_states": torch.randn(2, TOKENS, 2 * HIDDEN, generator=generator).to(dtype),
        "last_hidden_state": torch.randn(2, TOKENS, HIDDEN, generator=generator).to(dtype),
    }


ANCHORS = torch.tensor([[2, 7, 15, 16], [0, 10, 0, 0]])
KEEP = torch.tensor([[True, True, True, True], [True, True, False, False]])
BLOCKS = [(row, block) for row in range(2) for block in range(4) if KEEP[row, block]]
TRAINED = torch.tensor(
    [
        [[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0]],
        [[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]],
    ]
)
"""Blocks end at the hole (token 9), at the end of the batch and where the second sample's padding begins."""


def decoded_states(draft: DSparkDraft, batch: dict[str, Tensor], row: int, anchor: int) -> Tensor:
    """The states ``[K, H]`` of the block behind `anchor` as decoding makes them."""
    cache = ContextCache.empty(draft, 1)
    cache.extend(draft, batch["hidden_states"][row : row + 1, :anchor], torch.arange(anchor)[None])
    ids = torch.full((1, BLOCK), draft.config.mask_token_id)
    ids[0, 0] = batch["input_ids"][row, anchor]
    return draft_block(draft, cache, ids, anchor + torch.arange(BLOCK)[None])[0]


def biases(draft: DSparkDraft, hidden: Tensor, previous: Tensor) -> Tensor:
    """The Markov head's bias ``[K, V]`` of one block, straight from the formulas."""
    head, states = draft.markov_head, []
    state = torch.zeros(draft.config.markov_rank, dtype=hidden.dtype)
    for slot, token in zip(hidden, previous.tolist(), strict=True):
        e = head.markov_w1.weight[token]
        if draft.config.markov_head_type == "gated":
            gate = torch.sigmoid(head.gate_proj.weight @ torch.cat((slot, e)) + head.gate_proj.bias)
            states.append(gate * e)
        elif draft.config.markov_head_type == "rnn":
            z = head.joint_proj.weight @ torch.cat((state, e, slot)) + head.joint_proj.bias
            gate, candidate, output = z.split(draft.config.markov_rank)
            state = torch.sigmoid(gate) * state + (1 - torch.sigmoid(gate)) * torch.tanh(candidate)
            states.append(torch.tanh(output))
        else:
            states.append(e)
    return torch.stack(states) @ head.markov_w2.weight.T


def plain_terms(draft: DSparkDraft, batch: dict[str, Tensor], gamma: float = 4.0) -> dict[str, Tensor]:
    """Numerators of the three terms, their divisor and the summed expected accept length."""
    sums = {name: torch.zeros((), dtype=torch.float64) for name in ("ce", "l1", "confidence", "weights", "tau")}
    for row, block in BLOCKS:
        anchor = int(ANCHORS[row, block])
        hidden = decoded_states(draft, batch, row, anchor)
        count = int(TRAINED[row, block].sum())
        previous, labels = (batch["input_ids"][row, anchor + i : anchor + i + count] for i in (0, 1))
        hidden = hidden[:count]
        q = (hidden @ draft.attached_head().T + biases(draft, hidden, previous)).softmax(-1)
        teacher = batch["last_hidden_state"][row, anchor : anchor + count]
        distance = (q - (teacher @ draft.attached_head().T).softmax(-1)).abs().sum(-1)
        weights = torch.exp(-torch.arange(count, dtype=hidden.dtype) / gamma)
        rate = (1 - 0.5 * distance).clamp(0, 1).detach()
        sums["ce"] = sums["ce"] - (weights * q[torch.arange(count), labels].log()).sum()
        sums["l1"] = sums["l1"] + (weights * distance).sum()
        sums["weights"] = sums["weights"] + weights.sum()
        sums["tau"] = sums["tau"] + 1 + rate.cumprod(0).sum()
        if draft.confidence_head is not None:
            seen = [hidden]
            if draft.config.confidence_head_with_markov:
                seen.append(draft.markov_head.markov_w1.weight[previous])
            logits = draft.confidence_head.proj(torch.cat(seen, -1)).squeeze(-1)
            doubt = F.binary_cross_entropy_with_logits(logits, rate, reduction="none")
            sums["confidence"] = sums["confidence"] + (weights * doubt).sum()
    return sums
