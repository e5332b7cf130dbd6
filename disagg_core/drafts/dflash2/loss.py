"""The loss of DFlash2: DFlash's, and a cross entropy over each slot's candidates.

The selector scores the C most likely tokens of a slot by the token that the sample has before it. Its cross entropy
towards the label is weighed as DFlash's is, and added to the total with ``loss_weight``; gradients reach the logits of
the candidates too. A label that is no candidate takes the place of the last one (``replace``), or the slot drops out of
the selector's sum (``drop``). With D-PACE the confidences are the selector's own with ``replace``, and those of the
logits with ``drop``. In training both sums are divided by the same number, which is known before the step.

Accuracy and accept length are those of the selector's choice after the right token, from the candidates as a server
has them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from disagg_core.drafts.dflash.attention import AttentionKernel
from disagg_core.drafts.dflash.batch import DFlashBatch
from disagg_core.drafts.dflash.blocks import run_blocks
from disagg_core.drafts.dflash.loss import BlockStep, DFlashLoss, DFlashOutput, figures_of, kernel_of
from disagg_core.drafts.dflash.options import BlockLossSection
from disagg_core.drafts.dflash.slot_loss import SlotLoss, slot_loss
from disagg_core.drafts.dflash2.drafter import walk
from disagg_core.drafts.dflash2.model import DFlash2Draft
from disagg_core.drafts.dflash2.options import SelectorSection
from disagg_core.drafts.figures import LossOutput, Ratio
from disagg_core.drafts.method import FrozenParts
from disagg_core.drafts.sampling import Sampler

_CODEBOOK_BYTES = {"cpu": 16 * 1024**2, "cuda": 512 * 1024**2}
"""Bytes of the candidates' codebook rows that are gathered at once."""


@dataclass(frozen=True)
class SelectorLoss:
    """Results of the selector for the R trained slots; `cross_entropy` takes gradients."""

    cross_entropy: Tensor  # [R]
    weights: Tensor  # [R], 0 where a slot dropped out
    right: Tensor  # [R] bool, its choice is the label

    @property
    def numerator(self) -> Tensor:
        """Weighted sum of the cross entropies."""
        return (self.weights * self.cross_entropy).sum()


@dataclass(frozen=True)
class DFlash2Output:
    """What a batch gives; only `loss` takes gradients. `base` are DFlash's figures, of the logits alone.

    Tensors by candidate are there on request, for slots 1 ... K - 1 of every block.
    """

    loss: Tensor  # scalar: base_loss + loss_weight * selector_loss
    base_loss: Tensor
    selector_loss: Tensor
    base: DFlashOutput
    correct: Tensor  # [K - 1] right choices of the selector
    accept_len_per_block: Tensor  # [batch, blocks], 0 for blocks without a trained slot
    candidate_recall: Tensor  # scalar: part of the trained slots whose label is a candidate
    candidate_ids: Tensor | None = None  # [batch, blocks, K - 1, C]
    scores: Tensor | None = None  # [batch, blocks, K - 1, C] after the sample's token
    target_index: Tensor | None = None  # [batch, blocks, K - 1] place of the label, 0 where it is none of them
    has_target: Tensor | None = None  # [batch, blocks, K - 1] bool
    walk: Tensor | None = None  # [batch, blocks, K - 1] tokens chosen greedily one after the other

    @property
    def accuracy(self) -> Tensor:
        """Part of the trained slots whose label the selector chooses."""
        return self.correct.sum() / self.base.acc_total.clamp(min=1)

    @property
    def accept_len(self) -> Tensor:
        """Mean accept length of the blocks with a trained slot, by the selector's choice."""
        return self.accept_len_per_block.sum() / (self.accept_len_per_block > 0).sum().clamp(min=1)


def dflash2_loss(
    draft: DFlash2Draft,
    inputs: Mapping[str, Tensor],
    *,
    anchors: Tensor,
    block_keep: Tensor,
    lm_head: Tensor | None = None,
    loss: BlockLossSection | None = None,
    selector: SelectorSection | None = None,
    gamma: float | Literal["default"] | None = "default",
    normaliser: Tensor | float | None = None,
    selector_normaliser: Tensor | float | None = None,
    window_by_anchor: bool = False,
    return_logits: bool = False,
    attention: AttentionKernel | Literal["auto"] = "auto",
) -> DFlash2Output:
    """Run the blocks of a batch and return loss and figures; arguments as those of `dflash_loss`.

    `selector_normaliser` divides the selector's sum; by default `normaliser` if it is given or D-PACE weighs, else the
    sum of the selector's own weights in this batch, without slots that dropped out.

    Raises:
        BadInput: tensors are missing or misshapen.
        IncompatibleDraft: nothing is attached to the draft.
    """
    section, choice = loss or BlockLossSection(), selector or SelectorSection()
    batch = DFlashBatch.of({**inputs, "anchors": anchors, "block_keep": block_keep})
    masks = [mask._replace(by_anchor=window_by_anchor) for mask in draft.config.layer_masks]
    step = BlockStep.of(draft, batch, lm_head, section, gamma=gamma, normaliser=normaliser)
    hidden = run_blocks(draft, batch.hidden_states, step.plan, masks, kernel_of(draft, attention), checkpointing=False)
    unary, selected = both_losses(draft, step, hidden, choice)
    if selector_normaliser is None:
        own = normaliser is None and section.divides_by == "weights"
        selector_normaliser = selected.weights.sum().clamp(min=torch.finfo().tiny) if own else step.divisor
    selector_loss = selected.numerator / selector_normaliser
    right = step.by_slot(selected.right.float())
    output = DFlash2Output(
        loss=unary.total + choice.loss_weight * selector_loss,
        base_loss=unary.total.detach(),
        selector_loss=selector_loss.detach(),
        base=step.output(unary),
        correct=right[:, 1:].sum(0),
        accept_len_per_block=step.by_block(step.accept_lengths(right)),
        candidate_recall=unary.recalled.float().sum() / max(1, len(unary.recalled)),
    )
    return _with_candidates(draft, step, hidden, output) if return_logits else output


def both_losses(
    draft: DFlash2Draft, step: BlockStep, hidden: Tensor, choice: SelectorSection, *, compiled: bool = False
) -> tuple[SlotLoss, SelectorLoss]:
    """Return DFlash's loss and the selector's, of states after the final norm ``[M, K, H]``."""
    replaces = choice.missing == "replace"
    unary = slot_loss(
        hidden,
        step.plan,
        step.labels,
        step.head,
        step.weights,
        step.divisor,
        candidates=draft.config.selector_top_k,
        with_labels=replaces,
        compiled=compiled,
    )
    trained = step.plan.trained_flat
    before, labels = step.plan.labels.flatten()[trained - 1], step.labels.flatten()[trained]
    ids = unary.candidate_ids
    scores = _scores(draft, hidden.flatten(0, 1)[trained], before, ids, unary.candidate_logits)
    index = (ids == labels[:, None]).int().argmax(1)
    cross_entropy = F.cross_entropy(scores, index, reduction="none")
    right = unary.recalled & (scores.argmax(1) == index)
    return unary, SelectorLoss(cross_entropy, _weights(step, unary, cross_entropy.detach(), replaces), right)


def _weights(step: BlockStep, unary: SlotLoss, cross_entropy: Tensor, replaces: bool) -> Tensor:
    """Return the weights ``[R]`` of the selector's cross entropies."""
    if not replaces:
        return unary.weights * unary.recalled
    if step.weights.type == "dflash":
        return unary.weights
    mask = step.plan.mask.to(cross_entropy.dtype)
    return step.weights.of(step.by_slot(cross_entropy), mask).flatten()[step.plan.trained_flat]


def _scores(draft: DFlash2Draft, hidden: Tensor, before: Tensor, ids: Tensor, logits: Tensor) -> Tensor:
    """Return `CandidateSelector` scores ``[R, C]``, computed again in the backward pass."""
    selector = draft.candidate_selector
    per_row = hidden.element_size() * ids.shape[1] * draft.config.selector_rank
    rows = max(1, _CODEBOOK_BYTES[hidden.device.type] // per_row)
    parts = zip(*(torch.split(x, rows) for x in (hidden, before, ids, logits)), strict=True)
    return torch.cat([checkpoint(selector, *part, use_reentrant=False, preserve_rng_state=False) for part in parts])


@torch.no_grad()
def _with_candidates(draft: DFlash2Draft, step: BlockStep, hidden: Tensor, output: DFlash2Output) -> DFlash2Output:
    """Return `output` with logits, candidates, scores and the greedy walk of every block."""
    base = step.with_logits(output.base, hidden)
    assert base.logits is not None
    rows = base.logits.flatten(0, 1)[step.plan.block_flat][:, 1:]
    logits, ids = rows.topk(draft.config.selector_top_k)
    before, labels = step.plan.labels[:, :-1], step.labels[:, 1:]
    matches = ids == labels[:, :, None]
    return replace(
        output,
        base=base,
        candidate_ids=step.by_block(ids),
        scores=step.by_block(draft.candidate_selector(hidden[:, 1:], before, ids, logits)),
        target_index=step.by_block(matches.int().argmax(-1)),
        has_target=step.by_block(matches.any(-1)),
        walk=step.by_block(walk(draft, Sampler(0.0), hidden[:, 1:], step.plan.tokens[:, 0]).ids),
    )


class DFlash2Loss(DFlashLoss):
    """The loss as a module, for FSDP; see `DFlashLoss`. `choice` are the selector's options."""

    draft: DFlash2Draft

    def __init__(
        self,
        draft: DFlash2Draft,
        parts: FrozenParts,
        section: BlockLossSection,
        choice: SelectorSection,
        *,
        activation_checkpointing: bool,
    ) -> None:
        super().__init__(draft, parts, section, activation_checkpointing=activation_checkpointing)
        self.choice = choice

    def forward(self, batch: DFlashBatch, normalisers: Mapping[str, Tensor]) -> LossOutput:
        """Return the batch's part of the window's loss, divided by the window's ``loss``, and figures."""
        step = BlockStep.of(self.draft, batch, self.lm_head, self.section, normaliser=normalisers["loss"])
        unary, selected = both_losses(self.draft, step, self.run(step), self.choice, compiled=self._compiled)
        weight, divisor = self.choice.loss_weight, self.share(step)
        base, chosen = (unary.weights * unary.cross_entropy).sum(), selected.numerator.detach()
        labels = step.labels.flatten()[step.plan.trained_flat]
        counted = torch.ones_like(unary.recalled, dtype=torch.float32).sum()
        ratios = {
            "loss": Ratio(base + weight * chosen, divisor),
            **figures_of(step, torch.where(selected.right, labels, -1)),
            "base_loss": Ratio(base, divisor),
            "selector_loss": Ratio(chosen, divisor),
            "candidate_recall": Ratio(unary.recalled.float().sum(), counted),
            **figures_of(step, unary.predicted, "base_"),
        }
        return LossOutput(unary.total + weight * selected.numerator / step.divisor, ratios)
