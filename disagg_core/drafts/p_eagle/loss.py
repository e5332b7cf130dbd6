"""The training of parallel depths (https://arxiv.org/abs/2602.01469).

The rows are real slots (depth 0) at every position and, for the anchors that `sampling` kept, slots to be filled at
the d positions after them. Each row is trained on the target's distribution after the token that its position names,
renormalised over the draft vocabulary; the loss is the mean of the soft cross entropy over the trained rows of all
depths together, with no weight for the depth. A row whose most likely token is outside the draft vocabulary adds
nothing. A window divides by the rows that its samples give to train on, which is known beforehand; rows that the draft
vocabulary rules out are among those, in `parallel_depths` by itself they are not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from disagg_core.drafts.figures import LossOutput, Ratio
from disagg_core.drafts.linear import linear
from disagg_core.drafts.p_eagle.attention import chain_attention
from disagg_core.drafts.p_eagle.batch import PEagleBatch, RowPlan, packed_batch, plan_rows
from disagg_core.drafts.p_eagle.model import LAYERS_READ, PEagleDraft
from disagg_core.drafts.p_eagle.row_loss import RowSums, Teacher, row_loss
from disagg_core.errors import BadInput


@dataclass(frozen=True)
class DepthsOutput:
    """What `parallel_depths` returns; only `loss` takes gradients. R rows, in the order they were given."""

    loss: Tensor  # scalar
    loss_num: Tensor  # scalar, sum of the cross entropies
    loss_den: Tensor  # scalar, what the sum was divided by
    logits: Tensor  # [1, R, K]
    position_mask: Tensor  # [1, R] bool, the rows that are trained
    accuracy_correct: Tensor  # [D] rows of each depth where the draft's argmax is the target's
    accuracy_total: Tensor  # [D] trained rows of each depth


def parallel_depths(draft: PEagleDraft, inputs: Mapping[str, Tensor]) -> DepthsOutput:
    """Run rows that were drawn elsewhere and return their loss, logits and counts.

    Args:
        draft: on the device and in the dtype to compute in, with weights and vocabulary map set.
        inputs: as `disagg_core.drafts.p_eagle.batch.packed_batch` takes them.

    Raises:
        BadInput: tensors are missing or misshapen.
        IncompatibleDraft: the draft has no embedding or no vocabulary map.
    """
    draft.require_complete()
    batch = packed_batch(inputs)
    _check_widths(draft, batch, None)
    plan = plan_rows(batch, draft.config, draft.fc.weight.device, every_row=True)
    normed = draft.norm(run_rows(draft, batch, plan))
    loss, sums = row_loss(plan, _teacher(draft, batch, None), draft.lm_head.weight, normed, None)
    back = torch.empty_like(plan.given)
    back[plan.given] = torch.arange(len(back), device=back.device)
    counted = sums.counted.sum()
    with torch.no_grad():
        logits = linear(normed, draft.lm_head.weight)[back]
    return DepthsOutput(
        loss=loss,
        loss_num=sums.cross_entropy.sum(),
        loss_den=counted,
        logits=logits[None],
        position_mask=sums.live[back][None],
        accuracy_correct=sums.correct,
        accuracy_total=sums.counted,
    )


def run_rows(draft: PEagleDraft, batch: PEagleBatch, plan: RowPlan, *, checkpointing: bool = False) -> Tensor:
    """Return the states ``[rows, H]`` of a plan's rows before the final norm."""
    ids = batch.input_ids.flatten()[plan.input_flat]
    mask_id = ids.new_full((1,), draft.config.mask_token_id)
    states = draft.project_states(batch.hidden_states.flatten(0, 1)[plan.input_flat])
    unfilled = draft.project_states(draft.mask_hidden.view(1, -1))
    longest = batch.layout.width
    angles = draft.rotary(plan.positions, longest, states.dtype)
    return draft.backbone(
        draft.embed(torch.cat((ids, mask_id))),
        torch.cat((states, unfilled)),
        angles,
        lambda _, query, key, value: chain_attention(plan.attention, query, key, value),
        source=plan.source,
        checkpointing=checkpointing,
    )


def _teacher(draft: PEagleDraft, batch: PEagleBatch, lm_head: Tensor | None, logit_cap: float | None = None) -> Teacher:
    reduced = draft.config.draft_vocab_size != draft.config.vocab_size
    return Teacher(batch.teacher.detach().flatten(0, 1), lm_head, draft.target_ids if reduced else None, logit_cap)


def _check_widths(draft: PEagleDraft, batch: PEagleBatch, lm_head: Tensor | None) -> None:
    hidden, vocabulary = draft.config.hidden_size, draft.config.vocab_size
    found = {"hidden_states": (batch.hidden_states.shape[-1], LAYERS_READ * hidden)}
    if lm_head is None:
        found["target_logits"] = (batch.teacher.shape[-1], vocabulary)
    else:
        found["last_hidden_state"] = (batch.teacher.shape[-1], lm_head.shape[1])
        found["lm_head"] = (lm_head.shape[0], vocabulary)
    wrong = [f"{name}: expected {wanted}, found {size}" for name, (size, wanted) in found.items() if size != wanted]
    if int(batch.depths.max()) >= draft.config.depths:
        wrong.append(f"depth: expected below {draft.config.depths}, found {int(batch.depths.max())}")
    if wrong:
        raise BadInput(f"batch and draft do not fit: {'; '.join(wrong)}")


class PEagleLoss(nn.Module):
    """The loss of a batch as the seam asks for it; every parameter of the draft is used inside `forward`.

    Args:
        draft: the draft.
        lm_head: the target's, ``[V, H]``, best in the dtype the target computes in; frozen.
        logit_cap: bound of the target's logits.
        activation_checkpointing: compute activations again in the backward pass.
    """

    def __init__(
        self,
        draft: PEagleDraft,
        lm_head: Tensor,
        *,
        logit_cap: float | None = None,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.draft = draft
        self.lm_head = nn.Parameter(lm_head.detach(), requires_grad=False)
        self.logit_cap = logit_cap
        self.activation_checkpointing = activation_checkpointing
        self._compiled = False

    def compile(self, *args: Any, **options: Any) -> None:
        """Compile the parts of the step that fuse: norms, MLPs and the passes over the vocabulary.

        The loops around them depend on each batch's rows and stay eager. Arguments are `torch.compile`'s.
        """
        for layer in map(self.draft.layer, range(len(self.draft.layers))):
            layer.mlp.compile(*args, **options)
            layer.post_attention_layernorm.compile(*args, **options)
        self.draft.norm.compile(*args, **options)
        self._compiled = True

    def forward(self, batch: PEagleBatch, normalisers: Mapping[str, Tensor]) -> LossOutput:
        """Return loss and figures of `batch`."""
        draft = self.draft
        draft.require_complete()
        _check_widths(draft, batch, self.lm_head)
        plan = plan_rows(batch, draft.config, draft.fc.weight.device)
        if batch.context is not None:
            plan = plan.of_picked()
        states = run_rows(draft, batch, plan, checkpointing=self.activation_checkpointing)
        total, sums = row_loss(
            plan,
            _teacher(draft, batch, self.lm_head, self.logit_cap),
            draft.lm_head.weight,
            draft.norm(states),
            normalisers["rows"].clamp(min=1),
            compiled=self._compiled,
        )
        return LossOutput(total, _ratios(sums, plan.trained))


def _ratios(sums: RowSums, trained: Tensor) -> dict[str, Ratio]:
    return {
        "loss": Ratio(sums.cross_entropy.sum().reshape(1), trained.sum().reshape(1)),
        "depth_losses": Ratio(sums.cross_entropy, trained),
        "accuracies": Ratio(sums.correct, trained),
    }
