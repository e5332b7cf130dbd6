"""The loss of DSpark: cross entropy, distance to the target, and what the confidence head is to know.

Slot s of the block with anchor p predicts token p + s + 1 with the distribution ``q`` of its logits, bias included;
``t`` is the target's at position p + s. A slot weighs ``w(s) = exp(-s / gamma)`` up to the block's first label that is
not trained on, and 0 from there. Each term is summed over the window with these weights and divided by the window's
sum of weights, or of trained slots:

- ce: ``-log q(token)``;
- l1: ``sum_v |q - t|``, twice the total variation;
- confidence: binary cross entropy of the head's logit with ``c = 1 - l1 / 2``, the probability that a drafted token
  stands, through which no gradient goes.

The loss is their weighted sum. A block's expected accept length is ``1 + sum_s prod_{i <= s} c(i)``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from disagg_core.drafts.dflash.batch import BlockPlan, DFlashBatch, plan_blocks
from disagg_core.drafts.dflash.blocks import run_blocks
from disagg_core.drafts.dflash.loss import kernel_of
from disagg_core.drafts.dflash.model import DecoderLayer
from disagg_core.drafts.dspark.batch import decay, divisor, shifted_mask
from disagg_core.drafts.dspark.model import DSparkDraft
from disagg_core.drafts.dspark.options import DSparkLossSection
from disagg_core.drafts.dspark.slot_terms import SlotTerms, Teaching, slot_terms
from disagg_core.drafts.figures import LossOutput, Ratio
from disagg_core.drafts.method import FrozenParts
from disagg_core.drafts.upload import uploaded
from disagg_core.errors import BadInput


@dataclass(frozen=True)
class DSparkStep:
    """What a step knows before the draft is run."""

    batch: DFlashBatch
    plan: BlockPlan
    previous: Tensor  # [M, K] the token at each slot's own position
    weights: Tensor  # [K]
    divisor: Tensor  # scalar, of the window
    own_divisor: Tensor  # scalar, what the batch adds to it
    lm_head: Tensor  # [V, H]
    head_scale: float
    logit_cap: float | None
    section: DSparkLossSection

    @classmethod
    def of(
        cls,
        draft: DSparkDraft,
        batch: DFlashBatch,
        lm_head: Tensor | None,
        section: DSparkLossSection,
        normaliser: Tensor | float | None = None,
        *,
        logit_cap: float | None = None,
    ) -> DSparkStep:
        """Return the step of `batch`; `normaliser` is the window's divisor, by default the batch's own.

        Raises:
            BadInput: the states are not of the draft's width, or the target's last state is missing.
        """
        config, device, dtype = draft.config, draft.fc.weight.device, draft.fc.weight.dtype
        head = draft.attached_head() if lm_head is None else lm_head.detach()
        _check_states(batch, len(config.target_layer_ids) * config.hidden_size, config.hidden_size)
        mask = shifted_mask(batch, config.block_size)
        plan = plan_blocks(batch, config.block_size, config.mask_token_id, device, trained=mask, ahead=1)
        work = torch.float64 if dtype == torch.float64 else torch.float32
        own = divisor(mask, section).to(work)
        whole = torch.as_tensor(own if normaliser is None else normaliser, dtype=work, device=device)
        return cls(
            batch=batch,
            plan=plan,
            previous=uploaded(batch.input_ids.flatten().long(), device)[plan.source_flat],
            weights=uploaded(decay(config.block_size, section.gamma).to(work), device),
            divisor=whole.clamp(min=torch.finfo(work).tiny),
            own_divisor=torch.full((), float(own), dtype=work, device=device),
            lm_head=head,
            head_scale=draft.head_scale,
            logit_cap=logit_cap,
            section=section,
        )

    def teaching(self) -> Teaching:
        """Return what the trained slots are compared with; weights are divided already."""
        plan, trained = self.plan, self.plan.trained_flat
        return Teaching(
            labels=plan.labels.flatten()[trained],
            states=self.teacher_states(plan.last_flat.flatten()[trained]),
            lm_head=self.lm_head,
            weights=self.slot_weights() / self.divisor,
            cross_entropy=self.section.ce,
            distance=self.section.l1,
            head_scale=self.head_scale,
            logit_cap=self.logit_cap,
        )

    def teacher_states(self, places: Tensor) -> Tensor:
        """Return the target's last states ``[..., H]`` at `places`, indices into those of the batch, flattened."""
        last = self.batch.last_hidden_state
        assert last is not None
        return last.flatten(0, 1)[places]

    def slot_weights(self) -> Tensor:
        """Return the weights of the trained slots ``[R]``."""
        return self.weights[self.plan.trained_flat % self.plan.block_size]

    def by_slot(self, rows: Tensor) -> Tensor:
        """Return values of the trained slots ``[R]`` as ``[M, K]``, 0 elsewhere."""
        shape = self.plan.labels.shape
        return rows.new_zeros(shape).flatten().index_copy(0, self.plan.trained_flat, rows).view(shape)

    def by_block(self, values: Tensor) -> Tensor:
        """Return values of the M blocks ``[M, ...]`` as ``[batch, blocks, ...]``, 0 where no block is."""
        shape = (*self.batch.anchors.shape, *values.shape[1:])
        flat = values.new_zeros(shape).flatten(0, 1)
        return flat.index_copy(0, self.plan.block_flat, values).view(shape)

    def run(self, draft: DSparkDraft, *, checkpointing: bool) -> DSparkTerms:
        """Run the blocks and return the terms of the trained slots."""
        hidden = run_blocks(
            draft,
            self.batch.hidden_states,
            self.plan,
            draft.config.layer_masks,
            kernel_of(draft),
            checkpointing=checkpointing,
        )
        head = draft.markov_head
        embedded = head.markov_w1(self.previous)
        vectors = head.vectors(embedded, hidden)
        trained = self.plan.trained_flat
        terms = slot_terms(
            hidden.flatten(0, 1)[trained], vectors.flatten(0, 1)[trained], head.markov_w2.weight, self.teaching()
        )
        accept_rate = (1 - terms.distance / 2).clamp(0, 1)
        confidence = draft.confidence_head(hidden, embedded) if draft.confidence_head is not None else None
        doubt = None
        if confidence is not None:
            logits = confidence.flatten()[trained].to(accept_rate.dtype)
            doubt = F.binary_cross_entropy_with_logits(logits, accept_rate, reduction="none")
        return DSparkTerms(self, terms, hidden, vectors, accept_rate, confidence, doubt)


def _check_states(batch: DFlashBatch, wide: int, narrow: int) -> None:
    if batch.last_hidden_state is None:
        raise BadInput("batch: expected last_hidden_state, which the target's distribution is made of; it is missing")
    found = {"hidden_states": batch.hidden_states, "last_hidden_state": batch.last_hidden_state}
    shape = batch.input_ids.shape
    faults = [
        f"{name}: expected {[*shape, width]}, found {list(found[name].shape)}"
        for name, width in {"hidden_states": wide, "last_hidden_state": narrow}.items()
        if found[name].shape[-1] != width or (batch.context is None and found[name].shape[:-1] != shape)
    ]
    if faults:
        raise BadInput(f"batch and draft do not fit: {'; '.join(faults)}")


@dataclass(frozen=True)
class DSparkTerms:
    """The terms of a step's R trained slots; `slots.total` and `doubt` take gradients."""

    step: DSparkStep
    slots: SlotTerms
    hidden: Tensor  # [M, K, H] after the final norm
    vectors: Tensor  # [M, K, r] the Markov head's
    accept_rate: Tensor  # [R] c
    confidence: Tensor | None  # [M, K] logits; None without a head
    doubt: Tensor | None  # [R] their binary cross entropy with c

    @property
    def numerators(self) -> dict[str, Tensor]:
        """The weighted sum of each term, scalars."""
        weights = self.step.slot_weights()
        terms = {"ce": self.slots.cross_entropy, "l1": self.slots.distance}
        if self.doubt is not None:
            terms["confidence"] = self.doubt
        return {name: (weights * term).sum() for name, term in terms.items()}

    @property
    def total(self) -> Tensor:
        """The loss, scalar."""
        if self.doubt is None:
            return self.slots.total
        scale = self.step.section.confidence / self.step.divisor
        return self.slots.total + scale * (self.step.slot_weights() * self.doubt).sum()

    @torch.no_grad()
    def correct(self) -> Tensor:
        """Return which slots are predicted right, ``[M, K]``, 0 where none is trained."""
        labels = self.step.plan.labels.flatten()[self.step.plan.trained_flat]
        return self.step.by_slot((self.slots.predicted == labels).to(self.accept_rate.dtype))

    def lengths_of(self, rates: Tensor) -> Tensor:
        """Return ``1 + sum_s prod_{i <= s} rates(i)`` over the trained slots ``[M]``, 0 for blocks without one."""
        mask = self.step.plan.mask
        return torch.where(mask.any(1), 1 + rates.cumprod(1).sum(1), 0)

    @torch.no_grad()
    def ratios(self) -> dict[str, Ratio]:
        """Return the figures of the step; those by slot are ``[K]``."""
        step, own, mask = self.step, self.step.own_divisor, self.step.plan.mask
        section, numerators, correct = step.section, self.numerators, self.correct()
        rates, blocks = step.by_slot(self.accept_rate), mask.any(1).float().sum()
        loss = torch.stack([getattr(section, name) * value for name, value in numerators.items()]).sum()
        return {
            "loss": Ratio(loss, own),
            **{f"{name}_loss": Ratio(value, own) for name, value in numerators.items()},
            "accuracies": Ratio(correct.sum(0), mask.sum(0)),
            "acceptance_rates": Ratio(rates.sum(0), mask.sum(0)),
            "block_accept_length": Ratio(self.lengths_of(correct).sum(), blocks),
            "expected_accept_length": Ratio(self.lengths_of(rates).sum(), blocks),
        }


class DSparkLoss(nn.Module):
    """The loss as a module, for FSDP: every parameter of the draft is used inside `forward`.

    Args:
        draft: the draft.
        parts: the target's; the LM head best in the dtype that is computed in.
        section: loss options.
        activation_checkpointing: compute activations again in the backward pass.
    """

    def __init__(
        self, draft: DSparkDraft, parts: FrozenParts, section: DSparkLossSection, *, activation_checkpointing: bool
    ) -> None:
        super().__init__()
        self.draft = draft
        self.lm_head = nn.Parameter(parts.lm_head.detach(), requires_grad=False)
        self.logit_cap = parts.logit_cap
        self.section = section
        self.activation_checkpointing = activation_checkpointing

    def compile(self, *args: Any, **options: Any) -> None:
        """Compile norms and MLPs of the layers; arguments are `torch.compile`'s."""
        for layer in self.draft.layers.children():
            assert isinstance(layer, DecoderLayer)
            for module in (layer.mlp, layer.input_layernorm, layer.post_attention_layernorm):
                module.compile(*args, **options)

    def forward(self, batch: DFlashBatch, normalisers: Mapping[str, Tensor]) -> LossOutput:
        """Return the batch's part of the window's loss, divided by the window's ``loss``, and figures.

        On a CPU activations are always computed again, as `disagg_core.drafts.dflash.loss.DFlashLoss` does.
        """
        step = DSparkStep.of(
            self.draft, batch, self.lm_head, self.section, normalisers["loss"], logit_cap=self.logit_cap
        )
        on_cpu = step.plan.anchors.device.type == "cpu"
        terms = step.run(self.draft, checkpointing=self.activation_checkpointing or on_cpu)
        return LossOutput(terms.total, terms.ratios())
