"""The training-time-test loss of EAGLE-3 (https://arxiv.org/abs/2503.01840).

Step ``k = 0 .. L-1`` at position t embeds token ``t + k + 1``, starts from the state of step ``k - 1``, and predicts
token ``t + k + 2``. With teacher ``p = softmax(z[t2d])``, draft ``q = softmax(logits)`` and the position mask ``m``
(loss mask, and the target's argmax is in the draft vocabulary):

- soft cross entropy: ``loss_k = sum m (-sum_v p_v log q_v) / N``
- acceptance: ``a_k(t) = sum_v min(p_full_v, q_v)`` with ``p_full = exp(z[t2d] - logsumexp_V z)``; ``a_k``, its mean
  over m
- LK alpha: the mean over m of ``-log a_k(t)``; an ``a_k(t)`` below the smallest normal number counts as that number
- LK lambda: ``w loss_k + (1 - w) (1 - a_k)`` with ``w = kl_scale exp(-kl_decay a_k)``, w without gradient
- total: ``sum_k step_decay^k loss_k``

N is the number of live positions of test step 0 (``valid``) or ``batch * tokens`` (``compat``). When N is that of a
window of several batches, the LK losses take each mean over m within a batch, weighted by the batch's share of N.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from disagg_core.drafts.eagle3.attention import AttentionKernel
from disagg_core.drafts.eagle3.batch import Eagle3Batch, MaskMode, StepPlan, plan_step, step_mask
from disagg_core.drafts.eagle3.lm_loss import Objective, StepSums, Teacher, lm_loss
from disagg_core.drafts.eagle3.model import Eagle3Draft
from disagg_core.drafts.eagle3.options import LossSection
from disagg_core.drafts.eagle3.steps import run_steps
from disagg_core.drafts.linear import linear
from disagg_core.errors import BadInput

Normalisation = Literal["valid", "compat"]
LossType = Literal["soft_cross_entropy", "lk_alpha", "lk_lambda"]


@dataclass(frozen=True)
class TttOutput:
    """Figures of one batch; only `total` takes gradients. Sum counts over batches and ranks before dividing."""

    total: Tensor  # scalar
    step_losses: Tensor  # [L]
    correct: Tensor  # [L] positions where the draft's argmax is the target's
    denominators: Tensor  # [L] loss-masked positions: accuracy = correct / denominators
    accepted: Tensor  # [L] sum over live positions of sum_v min(p_full, q)
    live: Tensor  # [L] loss-masked positions whose target token is in the draft vocabulary
    acceptance_rates: Tensor  # [L] accepted / live
    logits: Tensor | None = None  # [L, batch, tokens, K], on request
    states: Tensor | None = None  # [L, batch, tokens, H] before the final norm, with the logits

    @property
    def accuracies(self) -> Tensor:
        """Accuracy of each step, ``[L]``."""
        return self.correct / self.denominators.clamp(min=1)


_FIELDS = (
    "total", "step_losses", "correct", "denominators", "accepted", "live", "acceptance_rates", "logits", "states"
)  # fmt: skip
# FSDP finds the tensor to start its backward pass from by flattening a module's output.
pytree.register_pytree_node(
    TttOutput,
    lambda output: ([getattr(output, name) for name in _FIELDS], None),
    lambda values, _: TttOutput(*values),
    serialized_type_name="draftline.TttOutput",
)


def training_time_test(
    draft: Eagle3Draft,
    batch: Eagle3Batch | Mapping[str, Tensor],
    *,
    lm_head: Tensor,
    logit_cap: float | None = None,
    ttt_length: int,
    mask_mode: MaskMode | None = None,
    normalisation: Normalisation | None = None,
    loss: LossSection | LossType = "soft_cross_entropy",
    normaliser: Tensor | float | None = None,
    return_logits: bool = False,
    attention: AttentionKernel | Literal["auto"] = "auto",
    activation_checkpointing: bool = False,
    compiled: bool = False,
) -> TttOutput:
    """Run the training-time test of a batch and return its loss and figures.

    Args:
        draft: on the device and in the dtype to compute in, with embedding and vocabulary map set.
        batch: unshifted inputs: `input_ids`, `attention_mask`, `loss_mask` ``[batch, tokens]``, `aux_hidden_states`
            ``[batch, tokens, 3 * H_t]``, `last_hidden_state` ``[batch, tokens, H_t]``; a mapping or an `Eagle3Batch`.
            Of one that ranks share, loss and figures are this rank's parts, which add up to its own.
        lm_head: the target's, ``[V, H_t]``; takes no gradient.
        logit_cap: bound of the target's logits.
        ttt_length: L.
        mask_mode: ``aligned`` or ``compat``; by default as `loss` says.
        normalisation: ``valid`` or ``compat``; by default as `loss` says.
        loss: options, or the type of the loss with default options.
        normaliser: N of the whole optimizer window, for ``valid``; by default that of this batch.
        return_logits: also return logits and states of every row.
        attention: ``auto`` takes the flash kernel on CUDA for half precision, FlexAttention for packed samples.
        activation_checkpointing: compute activations again in the backward pass.
        compiled: fuse the passes over the vocabulary with `torch.compile`.

    Raises:
        BadInput: tensors are missing or misshapen.
        IncompatibleDraft: the draft has no embedding or no vocabulary map.
    """
    draft.require_complete()
    section = LossSection(type=loss) if isinstance(loss, str) else loss
    batch = Eagle3Batch.of(batch)
    _check_widths(draft, batch, lm_head)
    mask = step_mask(batch.loss_mask, batch.attention_mask, mask_mode or section.mask_mode)
    kernel = _attention_kernel(draft, batch) if attention == "auto" else attention
    every_row = return_logits or mask.device.type != "cpu"
    plan = _plan(batch, mask, ttt_length, draft.fc.weight.device, every_row=every_row, dense=kernel == "flash")
    states = run_steps(draft, batch, plan, kernel, checkpointing=activation_checkpointing)
    normed = [draft.norm(state) for state in states]
    objective = _objective(section, normalisation or section.normalisation, mask, plan, normaliser)
    teacher = _teacher(draft, batch, lm_head, logit_cap)
    total, step_losses, sums = lm_loss(plan, teacher, objective, draft.lm_head.weight, normed, compiled=compiled)
    output = _output(total, step_losses, sums, plan)
    return _with_rows(output, draft, states, normed, mask.shape) if return_logits else output


def _plan(
    batch: Eagle3Batch, mask: Tensor, ttt_length: int, device: torch.device, *, every_row: bool, dense: bool
) -> StepPlan:
    """Return what each step computes: this rank's share, where ranks share the batch."""
    if batch.shared is not None:
        return batch.shared.on(device)
    return plan_step(
        mask, batch.attention_mask, ttt_length, device, every_row=every_row, dense=dense, layout=batch.layout
    )


def _output(total: Tensor, step_losses: Tensor, sums: StepSums, plan: StepPlan) -> TttOutput:
    return TttOutput(
        total=total,
        step_losses=step_losses,
        correct=sums.correct,
        denominators=plan.denominators,
        accepted=sums.accepted,
        live=sums.live,
        acceptance_rates=sums.accepted / sums.live.clamp(min=1),
    )


def _teacher(draft: Eagle3Draft, batch: Eagle3Batch, lm_head: Tensor, logit_cap: float | None) -> Teacher:
    draft_ids = None
    if draft.config.draft_vocab_size != draft.config.vocab_size:
        draft_ids = draft.d2t + torch.arange(draft.d2t.numel(), device=draft.d2t.device)
    return Teacher(batch.last_hidden_state.detach().flatten(0, 1), lm_head.detach(), draft_ids, logit_cap)


@torch.no_grad()
def _with_rows(
    output: TttOutput, draft: Eagle3Draft, states: Sequence[Tensor], normed: Sequence[Tensor], shape: torch.Size
) -> TttOutput:
    """Return `output` with the logits and states of all rows ``shape = [batch, tokens]``."""
    logits = linear(torch.stack(list(normed)), draft.lm_head.weight)
    by_row = (len(states), *shape, -1)
    return replace(output, logits=logits.view(by_row), states=torch.stack(list(states)).view(by_row))


def _check_widths(draft: Eagle3Draft, batch: Eagle3Batch, lm_head: Tensor) -> None:
    width = draft.config.target_hidden_size
    found = {
        "aux_hidden_states": (batch.aux_hidden_states.shape[-1], 3 * width),
        "last_hidden_state": (batch.last_hidden_state.shape[-1], width),
        "lm_head": (tuple(lm_head.shape), (draft.config.vocab_size, width)),
    }
    wrong = [
        f"{name}: expected {expected}, found {size}" for name, (size, expected) in found.items() if size != expected
    ]
    if wrong:
        raise BadInput(f"batch and draft do not fit: {'; '.join(wrong)}")


def _attention_kernel(draft: Eagle3Draft, batch: Eagle3Batch) -> AttentionKernel:
    """Return a kernel that the device has for the dtype and head: flash only where no live row would see padding."""
    weight, head_dim = draft.fc.weight, draft.config.head_dim
    fits = weight.is_cuda and weight.dtype in (torch.bfloat16, torch.float16) and head_dim % 8 == 0 and head_dim <= 256
    if fits and batch.packing is not None and head_dim >= 16 and head_dim & (head_dim - 1) == 0:
        return "flex"
    fits = fits and batch.shared is None
    return "flash" if fits and _right_padded(batch.attention_mask) else "chunked"


def _right_padded(attention_mask: Tensor) -> bool:
    """Tell whether padding only follows tokens; a mask on a device is taken to be so, not to wait for it."""
    if attention_mask.device.type != "cpu":
        return True
    real = attention_mask != 0
    return bool((real[:, :-1] | ~real[:, 1:]).all())


def _objective(
    section: LossSection,
    normalisation: Normalisation,
    mask: Tensor,
    plan: StepPlan,
    normaliser: Tensor | float | None,
) -> Objective:
    counted = plan.positions
    one = torch.ones_like(counted)
    if normalisation == "compat":
        return Objective(section, one * mask.numel(), one)
    if normaliser is None:
        normaliser = counted
    whole = torch.as_tensor(normaliser, device=counted.device).to(counted.dtype).clamp(min=1)
    return Objective(section, whole, counted / whole)


class Eagle3Loss(nn.Module):
    """`training_time_test` as a module, for FSDP: every parameter of the draft is used inside `forward`.

    Args:
        draft: the draft.
        lm_head: the target's, ``[V, H_t]``, best in the dtype the target computes in; frozen.
        section: loss options.
        ttt_length: L.
        logit_cap: bound of the target's logits.
        activation_checkpointing: compute activations again in the backward pass.
    """

    def __init__(
        self,
        draft: Eagle3Draft,
        lm_head: Tensor,
        section: LossSection,
        ttt_length: int,
        *,
        logit_cap: float | None = None,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.draft = draft
        self.lm_head = nn.Parameter(lm_head.detach(), requires_grad=False)
        self.logit_cap = logit_cap
        self.section = section
        self.ttt_length = ttt_length
        self.activation_checkpointing = activation_checkpointing
        self._compiled = False

    def compile(self, *args: Any, **options: Any) -> None:
        """Compile the parts of the step that fuse: norms, MLP and the passes over the vocabulary.

        The loops around them depend on each batch's rows and stay eager. Arguments are `torch.compile`'s.
        """
        layer = self.draft.midlayer
        for module in (layer.mlp, layer.hidden_norm, layer.post_attention_layernorm, self.draft.norm):
            module.compile(*args, **options)
        self._compiled = True

    def forward(
        self, batch: Eagle3Batch | Mapping[str, Tensor], *, normaliser: Tensor | float | None = None
    ) -> TttOutput:
        """Return loss and figures of a batch; `normaliser` is N of the whole window in ``valid`` normalisation."""
        return training_time_test(
            self.draft,
            batch,
            lm_head=self.lm_head,
            logit_cap=self.logit_cap,
            ttt_length=self.ttt_length,
            loss=self.section,
            normaliser=normaliser,
            activation_checkpointing=self.activation_checkpointing,
            compiled=self._compiled,
        )
