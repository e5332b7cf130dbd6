"""The loss of DFlash (https://arxiv.org/abs/2602.06036) and D-PACE (https://arxiv.org/abs/2605.18810).

Slot s of the block with anchor p predicts token p + s, with cross entropy ``CE(s)``. ``w(s)`` is 1 for trained slots
(after the anchor, not beyond the end, token trained on) and 0 else; a hole in the loss mask ends nothing.

- dflash: a slot weighs ``w(s) exp(-(s - 1) / gamma)``.
- D-PACE: with ``u(s) = (1 - alpha) exp(-CE(s)) + alpha``, 1 where w(s) = 0, and ``P(s) = prod_{i <= s} u(i)`` a slot
  weighs ``w(s) sum_{j >= s} P(j) w(j)`` (dpace), ``w(s) P(s)`` (dpace_prefix) or the first divided by P(s)
  (dpace_continuation). No gradient goes through the weights.
- total: the weighted sum of CE over the window, divided by the window's sum of slot weights, of w, or of samples.

The accept length of a block is 1 + the number of trained slots up to the first wrong one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from disagg_core.drafts.dflash.attention import AttentionKernel
from disagg_core.drafts.dflash.batch import BlockPlan, DFlashBatch, decay, divisor, plan_blocks, slot_mask
from disagg_core.drafts.dflash.blocks import run_blocks
from disagg_core.drafts.dflash.model import DecoderLayer, DFlashDraft
from disagg_core.drafts.dflash.options import BlockLossSection, default_gamma
from disagg_core.drafts.dflash.slot_loss import SlotLoss, SlotWeights, slot_loss
from disagg_core.drafts.dflash.vocabulary import Head
from disagg_core.drafts.figures import LossOutput, Ratio
from disagg_core.drafts.linear import linear
from disagg_core.drafts.method import FrozenParts
from disagg_core.drafts.upload import uploaded
from disagg_core.errors import BadInput

_ARGMAX_BYTES = 256 * 1024**2


@dataclass(frozen=True)
class DFlashOutput:
    """What a batch gives; only `loss` takes gradients. Tensors by slot are 0 where no block is.

    ``loss == loss_num / loss_den`` where nothing else was given to divide by. Cross entropies and predictions of slots
    that are not trained are there with `logits` only, on request.
    """

    loss: Tensor  # scalar
    loss_num: Tensor  # scalar: weighted sum of the cross entropies
    loss_den: Tensor  # scalar
    target_ids: Tensor  # [batch, blocks, K]
    pred_ids: Tensor  # [batch, blocks, K]
    ce: Tensor  # [batch, blocks, K]
    weight_mask: Tensor  # [batch, blocks, K], 1 for trained slots
    loss_weights: Tensor  # [batch, blocks, K]
    correct: Tensor  # [K - 1] right predictions of slots 1 ...
    counted: Tensor  # [K - 1] trained slots
    accept_len_per_block: Tensor  # [batch, blocks], 0 for blocks without a trained slot
    hidden: Tensor | None = None  # [batch, blocks, K, H] after the final norm, on request
    logits: Tensor | None = None  # [batch, blocks, K, V], on request

    @property
    def acc_correct(self) -> Tensor:
        """Right predictions of trained slots."""
        return self.correct.sum()

    @property
    def acc_total(self) -> Tensor:
        """Trained slots."""
        return self.counted.sum()

    @property
    def accuracy(self) -> Tensor:
        """Part of the trained slots whose prediction is right."""
        return self.acc_correct / self.acc_total.clamp(min=1)

    @property
    def accept_len(self) -> Tensor:
        """Mean accept length of the blocks with a trained slot."""
        return self.accept_len_per_block.sum() / (self.accept_len_per_block > 0).sum().clamp(min=1)


def dflash_loss(
    draft: DFlashDraft,
    inputs: Mapping[str, Tensor],
    *,
    anchors: Tensor,
    block_keep: Tensor,
    lm_head: Tensor | None = None,
    loss: BlockLossSection | None = None,
    gamma: float | Literal["default"] | None = "default",
    normaliser: Tensor | float | None = None,
    window_by_anchor: bool = False,
    return_logits: bool = False,
    attention: AttentionKernel | Literal["auto"] = "auto",
) -> DFlashOutput:
    """Run the blocks of a batch and return loss and figures.

    Args:
        draft: with the target's parts attached.
        inputs: `input_ids`, `loss_mask` ``[batch, tokens]``, `hidden_states` ``[batch, tokens, C * H]``, and
            `last_hidden_state` ``[batch, tokens, H]`` (after the target's final norm) for its labels.
        anchors: ``[batch, blocks]`` int64.
        block_keep: ``[batch, blocks]`` bool, False where no block is.
        lm_head: the target's ``[V, H]``, if another tensor than the attached one.
        loss: options.
        gamma: in place of the options'; None weighs all slots alike.
        normaliser: what the window's sum is divided by; by default what the options say, of this batch.
        window_by_anchor: see `LayerMask`.
        return_logits: also return states, logits and cross entropies of every slot.
        attention: ``auto`` takes FlexAttention on CUDA.

    Raises:
        BadInput: tensors are missing or misshapen.
        IncompatibleDraft: nothing is attached to the draft.
    """
    section = loss or BlockLossSection()
    batch = DFlashBatch.of({**inputs, "anchors": anchors, "block_keep": block_keep})
    masks = [mask._replace(by_anchor=window_by_anchor) for mask in draft.config.layer_masks]
    step = BlockStep.of(draft, batch, lm_head, section, gamma=gamma, normaliser=normaliser)
    hidden = run_blocks(draft, batch.hidden_states, step.plan, masks, kernel_of(draft, attention), checkpointing=False)
    result = slot_loss(hidden, step.plan, step.labels, step.head, step.weights, step.divisor)
    output = step.output(result)
    return step.with_logits(output, hidden) if return_logits else output


@dataclass(frozen=True)
class BlockStep:
    """What a step knows before the draft is run: its blocks, labels, weights and divisor."""

    batch: DFlashBatch
    plan: BlockPlan
    labels: Tensor  # [M, K]
    head: Head
    weights: SlotWeights
    divisor: Tensor  # scalar
    slots: Tensor  # [K] fp64, fixed weight of each slot as it is computed with, in host memory

    @classmethod
    def of(
        cls,
        draft: DFlashDraft,
        batch: DFlashBatch,
        lm_head: Tensor | None,
        section: BlockLossSection,
        *,
        gamma: float | Literal["default"] | None = "default",
        normaliser: Tensor | float | None = None,
    ) -> BlockStep:
        """Return the step of `batch`.

        Raises:
            BadInput: the states are not of the draft's width, or labels need a state that is missing.
        """
        config, device = draft.config, draft.fc.weight.device
        head = draft.attached_head() if lm_head is None else lm_head.detach()
        scale = draft.head_scale
        expected, found = len(config.target_layer_ids) * config.hidden_size, batch.hidden_states.shape[-1]
        if expected != found:
            raise BadInput(f"batch and draft do not fit: hidden_states: expected {expected} wide, found {found}")
        plan = plan_blocks(batch, config.block_size, config.mask_token_id, device)
        if gamma == "default":
            gamma = section.gamma or default_gamma(config.block_size)
        slots = decay(config.block_size, gamma)
        if normaliser is None:
            normaliser = divisor(slot_mask(batch, config.block_size), section.divides_by, slots)
        work = torch.float64 if draft.fc.weight.dtype == torch.float64 else torch.float32
        whole = torch.as_tensor(normaliser, dtype=work, device=device)
        return cls(
            batch=batch,
            plan=plan,
            labels=plan.labels if section.label == "data" else teacher_labels(plan, batch, head),
            head=Head(head, config.output_multiplier / scale, config.final_logit_softcapping),
            weights=SlotWeights(section.type, uploaded(slots.to(work), device), section.dpace_alpha),
            divisor=whole.clamp(min=torch.finfo(work).tiny),
            slots=slots.to(work).double(),
        )

    def by_slot(self, rows: Tensor) -> Tensor:
        """Return values of the trained slots ``[R]`` as ``[M, K]``, 0 elsewhere."""
        return _scattered(rows, self.plan.trained_flat, self.plan.labels.shape)

    def by_block(self, values: Tensor) -> Tensor:
        """Return values of the M blocks ``[M, ...]`` as ``[batch, blocks, ...]``, 0 where no block is."""
        shape = torch.Size((*self.batch.anchors.shape, *values.shape[1:]))
        flat = values.new_zeros(shape).flatten(0, 1)
        return flat.index_copy(0, self.plan.block_flat, values).view(shape)

    def correct(self, predicted: Tensor) -> Tensor:
        """Return which trained slots ``[R]`` are predicted right, as ``[M, K]`` fp32."""
        labels = self.labels.flatten()[self.plan.trained_flat]
        return self.by_slot((predicted == labels).float())

    def accept_lengths(self, correct: Tensor) -> Tensor:
        """Return the accept length of each block ``[M]``, 0 without a trained slot, of right slots ``[M, K]``."""
        mask = self.plan.mask
        runs = (torch.where(mask != 0, correct, 1).cumprod(1) * mask).sum(1)
        return torch.where(mask.any(1), 1 + runs, 0)

    def output(self, result: SlotLoss) -> DFlashOutput:
        """Return `result` by batch and block."""
        correct = self.correct(result.predicted)
        return DFlashOutput(
            loss=result.total,
            loss_num=(result.weights * result.cross_entropy).sum(),
            loss_den=self.divisor,
            target_ids=self.by_block(self.labels),
            pred_ids=self.by_block(self.by_slot(result.predicted)),
            ce=self.by_block(self.by_slot(result.cross_entropy)),
            weight_mask=self.by_block(self.plan.mask),
            loss_weights=self.by_block(self.by_slot(result.weights)),
            correct=correct[:, 1:].sum(0),
            counted=self.plan.mask[:, 1:].sum(0),
            accept_len_per_block=self.by_block(self.accept_lengths(correct)),
        )

    @torch.no_grad()
    def with_logits(self, output: DFlashOutput, hidden: Tensor) -> DFlashOutput:
        """Return `output` with states, logits, cross entropies and predictions of all slots."""
        logits = self.head.shaped_(linear(hidden, self.head.weight.to(hidden.dtype)).clone())
        ce = nn.functional.cross_entropy(logits.flatten(0, 1), self.labels.flatten(), reduction="none")
        return replace(
            output,
            ce=self.by_block(ce.view(self.labels.shape)),
            pred_ids=self.by_block(logits.argmax(-1)),
            hidden=self.by_block(hidden),
            logits=self.by_block(logits),
        )


def _scattered(rows: Tensor, places: Tensor, shape: torch.Size) -> Tensor:
    return rows.new_zeros(shape).flatten().index_copy(0, places, rows).view(shape)


@torch.no_grad()
def teacher_labels(plan: BlockPlan, batch: DFlashBatch, lm_head: Tensor) -> Tensor:
    """Return the target's argmax for each slot, ``[M, K]``; slots that are not trained keep the sample's token.

    Raises:
        BadInput: the batch has no `last_hidden_state`.
    """
    if batch.last_hidden_state is None:
        raise BadInput("batch: expected last_hidden_state, from which the target's labels follow; it is missing")
    states = batch.last_hidden_state.flatten(0, 1)
    wanted = plan.taught_flat
    step = max(1, _ARGMAX_BYTES // (4 * lm_head.shape[0]))
    found = [linear(states[part].to(lm_head.dtype), lm_head).argmax(-1) for part in torch.split(wanted, step)]
    labels = torch.cat(found)[plan.taught_by] if found else wanted
    return plan.labels.flatten().index_copy(0, plan.trained_flat, labels).view(plan.labels.shape)


def kernel_of(draft: DFlashDraft, attention: AttentionKernel | Literal["auto"] = "auto") -> AttentionKernel:
    """Return the attention's kernel: FlexAttention on CUDA for heads that it knows."""
    if attention != "auto":
        return attention
    head_dim = draft.config.head_dim
    fits = draft.fc.weight.is_cuda and head_dim >= 16 and head_dim & (head_dim - 1) == 0
    return "flex" if fits else "gathered"


class DFlashLoss(nn.Module):
    """The loss as a module, for FSDP: every parameter of the draft is used inside `forward`.

    Args:
        draft: the draft.
        parts: the target's; the LM head best in the dtype that is computed in.
        section: loss options.
        activation_checkpointing: compute activations again in the backward pass.
    """

    def __init__(
        self, draft: DFlashDraft, parts: FrozenParts, section: BlockLossSection, *, activation_checkpointing: bool
    ) -> None:
        super().__init__()
        self.draft = draft
        self.lm_head = nn.Parameter(parts.lm_head.detach(), requires_grad=False)
        self.section = section
        self.activation_checkpointing = activation_checkpointing
        self._compiled = False

    def compile(self, *args: Any, **options: Any) -> None:
        """Compile the parts of the step that fuse: norms, MLPs and, as a GPU always does, the vocabulary passes.

        The loops around them depend on each batch's blocks and stay eager. Arguments are `torch.compile`'s.
        """
        for layer in self.draft.layers.children():
            assert isinstance(layer, DecoderLayer)
            for module in (layer.mlp, layer.input_layernorm, layer.post_attention_layernorm):
                module.compile(*args, **options)
        self._compiled = True

    def forward(self, batch: DFlashBatch, normalisers: Mapping[str, Tensor]) -> LossOutput:
        """Return the batch's part of the window's loss, divided by the window's ``loss``, and figures."""
        step = BlockStep.of(self.draft, batch, self.lm_head, self.section, normaliser=normalisers["loss"])
        hidden = self.run(step)
        result = slot_loss(
            hidden, step.plan, step.labels, step.head, step.weights, step.divisor, compiled=self._compiled
        )
        loss = Ratio((result.weights * result.cross_entropy).sum(), self.share(step))
        return LossOutput(result.total, {"loss": loss, **figures_of(step, result.predicted)})

    def run(self, step: BlockStep) -> Tensor:
        """Return the slots' states after the final norm, ``[M, K, H]``.

        On a CPU activations are always computed again: it costs an eighth of the step and halves its memory.
        """
        return run_blocks(
            self.draft,
            step.batch.hidden_states,
            step.plan,
            self.draft.config.layer_masks,
            kernel_of(self.draft),
            checkpointing=self.activation_checkpointing or step.plan.anchors.device.type == "cpu",
        )

    def share(self, step: BlockStep) -> Tensor:
        """Return what this batch adds to the window's divisor."""
        mask = slot_mask(step.batch, step.plan.block_size)
        share = divisor(mask, self.section.divides_by, step.slots)
        if step.batch.context is not None and self.section.divides_by == "sequences":
            share = share / step.batch.context.size  # each of the ranks has all of them
        return torch.full((), float(share), device=step.divisor.device)


@torch.no_grad()
def figures_of(step: BlockStep, predicted: Tensor, prefix: str = "") -> dict[str, Ratio]:
    """Return accuracy by slot ``[K - 1]`` and accept length of predictions ``[R]`` of the trained slots."""
    correct, mask = step.correct(predicted), step.plan.mask
    accepted = step.accept_lengths(correct)
    return {
        f"{prefix}accuracies": Ratio(correct[:, 1:].sum(0), mask[:, 1:].sum(0)),
        f"{prefix}block_accept_length": Ratio(accepted.sum(), (accepted > 0).sum().float()),
    }
