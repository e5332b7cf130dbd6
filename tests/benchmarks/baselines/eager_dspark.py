"""DSpark's training step written down plainly in eager torch: the yardstick of the benchmarks and an oracle of tests.

On DFlash's eager blocks: the logits of draft and target of all slots are there at once. Vanilla Markov heads only.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from disagg_core.drafts.dspark.model import DSparkDraft
from disagg_core.drafts.dspark.options import DSparkLossSection
from tests.benchmarks.baselines.eager_dflash import eager_blocks


def eager_dspark(draft: DSparkDraft, inputs: Mapping[str, Tensor], section: DSparkLossSection) -> Tensor:
    """Return the loss, normalised by weights."""
    blocks, size = eager_blocks(draft, inputs), draft.config.block_size
    embedded = draft.markov_head.markov_w1.weight[blocks.own]
    logits = F.linear(blocks.hidden, draft.lm_head) + F.linear(embedded, draft.markov_head.markov_w2.weight)
    teacher = F.linear(blocks.at_slots(inputs["last_hidden_state"]), draft.lm_head).softmax(-1)
    labels = blocks.at_slots(inputs["input_ids"], ahead=1)
    trained = (
        blocks.keep[:, :, None]
        & (blocks.positions + 1 < inputs["input_ids"].shape[1])
        & (blocks.at_slots(inputs["loss_mask"], ahead=1) != 0)
    ).cumprod(2)
    weights = trained * torch.exp(-torch.arange(size) / section.gamma)
    cross_entropy = -logits.log_softmax(-1).gather(3, labels[..., None]).squeeze(3)
    distance = (logits.softmax(-1) - teacher).abs().sum(-1)
    terms = section.ce * cross_entropy + section.l1 * distance
    if draft.confidence_head is not None:
        seen = torch.cat((blocks.hidden, embedded), dim=-1)
        rate = (1 - distance.detach() / 2).clamp(0, 1)
        confidence = draft.confidence_head.proj(seen).squeeze(-1)
        terms = terms + section.confidence * F.binary_cross_entropy_with_logits(confidence, rate, reduction="none")
    return (weights * terms).sum() / weights.sum()
