"""One batch through a DSpark draft with everything that it computes, for comparisons with other implementations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from disagg_core.drafts.dflash.batch import DFlashBatch
from disagg_core.drafts.dspark.drafter import walk
from disagg_core.drafts.dspark.loss import DSparkStep, DSparkTerms
from disagg_core.drafts.dspark.model import DSparkDraft
from disagg_core.drafts.dspark.options import DSparkLossSection
from disagg_core.drafts.linear import linear
from disagg_core.drafts.sampling import Sampler


@dataclass(frozen=True)
class DSparkOutput:
    """What a batch gives; only `loss` takes gradients. Tensors by slot are 0 where no block is.

    Each term is its numerator divided by the divisor, which all three share. Without a confidence head its tensors are
    None. What is V wide, and the walk, are there on request.
    """

    loss: Tensor  # scalar
    ce_loss: Tensor  # scalar
    l1_loss: Tensor  # scalar
    confidence_loss: Tensor | None  # scalar
    ce_num: Tensor  # scalar
    l1_num: Tensor  # scalar
    confidence_num: Tensor | None  # scalar
    loss_den: Tensor  # scalar
    target_ids: Tensor  # [batch, blocks, K] the labels
    pred_ids: Tensor  # [batch, blocks, K], 0 for slots that are not trained
    weight_mask: Tensor  # [batch, blocks, K], 1 for trained slots
    loss_weights: Tensor  # [batch, blocks, K]
    accept_rate: Tensor  # [batch, blocks, K], 0 for slots that are not trained
    confidence_logits: Tensor | None  # [batch, blocks, K]
    acc_correct: Tensor  # scalar
    acc_total: Tensor  # scalar
    accept_len_per_block: Tensor  # [batch, blocks], 0 for blocks without a trained slot
    tau_per_block: Tensor  # [batch, blocks] expected accept length, likewise
    hidden: Tensor | None = None  # [batch, blocks, K, H] after the final norm
    base_logits: Tensor | None = None  # [batch, blocks, K, V] without the bias
    logits: Tensor | None = None  # [batch, blocks, K, V]
    aligned_target_logits: Tensor | None = None  # [batch, blocks, K, V]
    walk_tokens: Tensor | None = None  # [batch, blocks, K] greedy, each slot after the token drafted before
    walk_logits: Tensor | None = None  # [batch, blocks, K, V]
    walk_confidence: Tensor | None = None  # [batch, blocks, K] logits

    @property
    def tau_sum(self) -> Tensor:
        """Sum of the expected accept lengths."""
        return self.tau_per_block.sum()

    @property
    def accept_len(self) -> Tensor:
        """Mean accept length of the blocks with a trained slot."""
        return self.accept_len_per_block.sum() / (self.accept_len_per_block > 0).sum().clamp(min=1)


def dspark_loss(
    draft: DSparkDraft,
    inputs: Mapping[str, Tensor],
    *,
    anchors: Tensor,
    block_keep: Tensor,
    lm_head: Tensor | None = None,
    loss: DSparkLossSection | None = None,
    normaliser: Tensor | float | None = None,
    return_logits: bool = False,
) -> DSparkOutput:
    """Run the blocks of a batch and return loss and figures.

    Args:
        draft: with the target's parts attached.
        inputs: `input_ids`, `loss_mask` ``[batch, tokens]``, `hidden_states` ``[batch, tokens, C * H]`` and
            `last_hidden_state` ``[batch, tokens, H]``, after the target's final norm.
        anchors: ``[batch, blocks]`` int64.
        block_keep: ``[batch, blocks]`` bool, False where no block is.
        lm_head: the target's ``[V, H]``, if another than the attached one.
        loss: options.
        normaliser: what the window's sums are divided by; by default what the options say, of this batch.
        return_logits: also return states, logits and the greedy walk of every block.

    Raises:
        BadInput: tensors are missing or misshapen.
        IncompatibleDraft: nothing is attached to the draft.
    """
    batch = DFlashBatch.of({**inputs, "anchors": anchors, "block_keep": block_keep})
    step = DSparkStep.of(draft, batch, lm_head, loss or DSparkLossSection(), normaliser)
    terms = step.run(draft, checkpointing=False)
    wide = _wide(draft, terms) if return_logits else {}
    return DSparkOutput(loss=terms.total, **_narrow(terms), **wide)


@torch.no_grad()
def _narrow(terms: DSparkTerms) -> dict[str, Any]:
    step, numerators, correct = terms.step, terms.numerators, terms.correct()
    found: dict[str, Any] = {"confidence_num": None, "confidence_loss": None, "confidence_logits": None}
    for name, value in numerators.items():
        found |= {f"{name}_num": value, f"{name}_loss": value / step.divisor}
    if terms.confidence is not None:
        found["confidence_logits"] = step.by_block(terms.confidence)
    rates = step.by_slot(terms.accept_rate)
    return found | {
        "loss_den": step.divisor,
        "target_ids": step.by_block(step.plan.labels),
        "pred_ids": step.by_block(step.by_slot(terms.slots.predicted)),
        "weight_mask": step.by_block(step.plan.mask),
        "loss_weights": step.by_block(step.by_slot(step.slot_weights())),
        "accept_rate": step.by_block(rates),
        "acc_correct": correct.sum(),
        "acc_total": step.plan.mask.sum(),
        "accept_len_per_block": step.by_block(terms.lengths_of(correct)),
        "tau_per_block": step.by_block(terms.lengths_of(rates)),
    }


@torch.no_grad()
def _wide(draft: DSparkDraft, terms: DSparkTerms) -> dict[str, Any]:
    step, hidden = terms.step, terms.hidden
    head = step.lm_head.to(hidden.dtype)
    base = linear(hidden, head) / step.head_scale
    states = step.teacher_states(step.plan.last_flat)
    walked = walk(draft, base, hidden, step.previous[:, 0], Sampler(0.0))
    return {
        "hidden": step.by_block(hidden),
        "base_logits": step.by_block(base),
        "logits": step.by_block(base + draft.markov_head.bias(terms.vectors)),
        "aligned_target_logits": step.by_block(linear(states.to(head.dtype), head)),
        "walk_tokens": step.by_block(walked.tokens),
        "walk_logits": step.by_block(walked.logits),
        "walk_confidence": None if walked.confidence is None else step.by_block(walked.confidence),
    }
