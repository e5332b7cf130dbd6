"""The loss over the vocabulary: teacher, draft logits, figures and gradients, one slice of positions at a time.

The L test steps that predict the same token share its teacher, so a slice is a few teacher rows with all their steps:
the teacher's logits over V are made once, reduced to logsumexp, argmax and K columns, and used for up to L draft rows.
Nothing that is K or V wide outlives its slice; what is kept for the backward pass is the gradient of the draft's
states ``[L, rows, H]`` and of its LM head ``[K, H]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from disagg_core.drafts.context import Context
from disagg_core.drafts.eagle3.batch import StepPlan
from disagg_core.drafts.eagle3.options import LossSection
from disagg_core.drafts.eagle3.vocabulary import Slopes, TeacherSlice, passes_on
from disagg_core.drafts.linear import bounded_, product, wide_product

_SLICE_BYTES = {"cpu": 8 * 1024**2, "cuda": 1024**3}
"""Bytes of one slice's draft logits in fp32."""
_TEACHER_BYTES = {"cpu": 64 * 1024**2, "cuda": 1024**3}
"""Bytes of one slice's teacher logits in fp32."""


@dataclass(frozen=True)
class Teacher:
    """The frozen side: where target logits come from. Nothing of it takes gradients."""

    hidden: Tensor  # [batch * tokens, H_t], after the target's final norm
    lm_head: Tensor  # [V, H_t]
    draft_ids: Tensor | None  # [K] target ids of the draft tokens, ascending; None: the whole vocabulary
    logit_cap: float | None = None


@dataclass(frozen=True)
class StepSums:
    """Sums over the live positions of each test step, fp32 (fp64 for fp64 drafts), ``[L]``."""

    cross_entropy: Tensor  # soft cross entropy
    accepted: Tensor  # a(t) = sum_v min(p_full, q)
    log_accepted: Tensor  # log a(t)
    correct: Tensor  # argmax of the draft is the target's
    live: Tensor  # positions counted: loss mask and the target's argmax in the draft vocabulary

    def over(self, context: Context) -> StepSums:
        """Return the sums over all ranks that share the batch. A collective."""
        parts = (self.cross_entropy, self.accepted, self.log_accepted, self.correct, self.live)
        return StepSums(*context.sum(torch.stack(parts)))


@dataclass(frozen=True)
class Objective:
    """How sums become a loss: formulas in `disagg_core.drafts.eagle3.loss`."""

    section: LossSection
    normaliser: Tensor  # N, scalar
    share: Tensor  # weight of this batch's means over m, scalar: its part of N in `valid` mode, else 1

    def step_losses(self, sums: StepSums, whole: StepSums) -> Tensor:
        """Return the loss of each step, ``[L]``: the part of `sums`, where those of the batch are `whole`."""
        cross_entropy = sums.cross_entropy / self.normaliser
        if self.section.type == "soft_cross_entropy":
            return cross_entropy
        counted = whole.live.clamp(min=1)
        if self.section.type == "lk_alpha":
            return -sums.log_accepted / counted * self.share
        weight = self._weight(whole)
        return weight * cross_entropy + (1 - weight) * (sums.live - sums.accepted) / counted * self.share

    def decays(self, like: Tensor) -> Tensor:
        """Return the weight of each step in the total, ``[L]``."""
        return self.section.step_decay ** torch.arange(like.numel(), device=like.device, dtype=like.dtype)

    def slopes(self, sums: StepSums) -> Slopes:
        """Return the derivatives of the total by the sums, which are those of the batch."""
        decays = self.decays(sums.live)
        if self.section.type == "soft_cross_entropy":
            return Slopes(decays / self.normaliser, None, None)
        by_mean = -decays * self.share / sums.live.clamp(min=1)
        if self.section.type == "lk_alpha":
            return Slopes(None, None, by_mean)
        weight = self._weight(sums)
        return Slopes(decays * weight / self.normaliser, (1 - weight) * by_mean, None)

    def _weight(self, sums: StepSums) -> Tensor:
        """Return w of LK lambda; it is a constant to `slopes`."""
        rate = sums.accepted / sums.live.clamp(min=1)
        return self.section.kl_scale * (-self.section.kl_decay * rate).exp()


def lm_loss(
    plan: StepPlan,
    teacher: Teacher,
    objective: Objective,
    lm_head: Tensor,
    normed: Sequence[Tensor],
    *,
    compiled: bool = False,
) -> tuple[Tensor, Tensor, StepSums]:
    """Return the total loss (scalar, differentiable by `lm_head` and `normed`), that of each step, and their sums.

    Where ranks share the batch, total, losses and sums are this rank's parts.

    Args:
        plan: the batch's rows.
        teacher: the frozen side.
        objective: the loss.
        lm_head: the draft's, ``[K, H]``.
        normed: states of the L steps after the final norm, each ``[rows, H]``.
        compiled: fuse the passes over the vocabulary with `torch.compile`.
    """
    found = _LmLoss.apply(plan, teacher, objective, compiled, lm_head, *normed)  # type: ignore[no-untyped-call]
    total, step_losses, *sums = found
    return total, step_losses, StepSums(*sums)


class _LmLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        plan: StepPlan,
        teacher: Teacher,
        objective: Objective,
        compiled: bool,
        lm_head: Tensor,
        *normed: Tensor,
    ) -> tuple[Tensor, ...]:
        work = torch.float64 if lm_head.dtype == torch.float64 else torch.float32
        empty = StepSums(*torch.zeros(5, plan.ttt_length, dtype=work, device=lm_head.device))
        # Gradients are made here and only scaled in `backward`: the logits are at hand now, slice by slice, and keeping
        # them, or making them again, would cost a K-wide tensor or a product. `total` alone takes gradients.
        gradients = _Gradients.like(lm_head, normed) if any(ctx.needs_input_grad) else None
        walk = _Walk(plan, teacher, lm_head, normed, work, compiled)
        if objective.section.type == "soft_cross_entropy":
            sums = whole = walk.run(objective.slopes(empty), gradients)
        else:
            # An LK loss divides by how many positions are live, and w depends on their acceptance: both are known only
            # after all slices, so the slices are computed twice.
            sums = walk.run(None, None)
            whole = sums if plan.context is None else sums.over(plan.context)
            if gradients is not None:
                walk.run(objective.slopes(whole), gradients)
        if gradients is not None:
            ctx.save_for_backward(
                gradients.lm_head.t().to(lm_head.dtype), *(g.to(lm_head.dtype) for g in gradients.normed)
            )
        step_losses = objective.step_losses(sums, whole)
        total = (objective.decays(sums.live) * step_losses).sum()
        figures = (step_losses, sums.cross_entropy, sums.accepted, sums.log_accepted, sums.correct, sums.live)
        ctx.mark_non_differentiable(*figures)
        return (total, *figures)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, None, *(saved * grads[0].to(saved.dtype) for saved in ctx.saved_tensors)


@dataclass
class _Gradients:
    """Gradients of the total while slices add to them."""

    lm_head: Tensor  # [H, K], transposed
    normed: list[Tensor]  # L times [rows, H]

    @classmethod
    def like(cls, lm_head: Tensor, normed: Sequence[Tensor]) -> _Gradients:
        work = torch.float64 if lm_head.dtype == torch.float64 else torch.float32
        return cls(lm_head.new_zeros(lm_head.shape[::-1], dtype=work), [torch.zeros_like(x) for x in normed])


class _Walk:
    """Goes over the teacher rows in slices."""

    def __init__(
        self,
        plan: StepPlan,
        teacher: Teacher,
        lm_head: Tensor,
        normed: Sequence[Tensor],
        work: torch.dtype,
        compiled: bool,
    ) -> None:
        self._plan, self._teacher, self._lm_head, self._normed, self._work = plan, teacher, lm_head, normed, work
        self._passes = passes_on(lm_head.device, compiled=compiled)
        vocabulary = teacher.lm_head.shape[0]
        self._draft_index: Tensor | None = None
        if teacher.draft_ids is not None:
            index = torch.full((vocabulary,), -1, dtype=torch.int64, device=lm_head.device)
            self._draft_index = index.index_copy(
                0, teacher.draft_ids, torch.arange(lm_head.shape[0], device=index.device)
            )
        device = lm_head.device.type
        by_draft = _SLICE_BYTES[device] // (4 * plan.ttt_length * lm_head.shape[0])
        by_teacher = _TEACHER_BYTES[device] // (4 * vocabulary)
        self._slice_rows = max(16, min(by_draft, by_teacher))

    def run(self, slopes: Slopes | None, gradients: _Gradients | None) -> StepSums:
        """Return the sums of all slices; with `slopes`, add the gradients of ``slopes . sums``."""
        steps = self._plan.ttt_length
        sums = torch.zeros(steps, 5, dtype=self._work, device=self._lm_head.device)
        for start in range(0, self._plan.teacher_flat.numel(), self._slice_rows):
            at = slice(start, start + self._slice_rows)
            teacher = self._teach(at)
            weight = (self._plan.teacher_valid[:, at] & teacher.live).to(self._work)  # [L, n]
            rows = self._plan.teacher_row[:, at]
            inputs = torch.cat([normed[row] for normed, row in zip(self._normed, rows, strict=True)])
            logits = wide_product(inputs, self._lm_head.t(), self._work).view(steps, -1, self._lm_head.shape[0])
            found, slope = self._passes.of_draft(logits, teacher, weight, slopes, inputs.dtype)
            sums += found
            if gradients is not None and slope is not None:
                self._add(gradients, slope.flatten(0, 1), inputs, rows)
        return StepSums(*sums.unbind(1))

    def _add(self, gradients: _Gradients, slope: Tensor, inputs: Tensor, rows: Tensor) -> None:
        """Add the slice's gradients, given the slope of the total by its logits ``[L * n, K]``."""
        gradients.lm_head += wide_product(inputs.t(), slope, self._work)
        for normed, row, grad in zip(
            gradients.normed, rows, product(slope, self._lm_head).chunk(len(rows)), strict=True
        ):
            # Added, not assigned: where u - k is before the start, `row` is the sample's first one, with a slope of 0.
            normed.index_add_(0, row, grad)

    def _teach(self, at: slice) -> TeacherSlice:
        plan, teacher = self._plan, self._teacher
        inside = plan.teacher_inside[at]
        hidden = teacher.hidden[plan.teacher_flat[at]].to(teacher.lm_head.dtype) * inside.unsqueeze(-1)
        logits = bounded_(wide_product(hidden, teacher.lm_head.t(), self._work), teacher.logit_cap)  # [n, V]
        probabilities, full, token = self._passes.of_teacher(logits, teacher.draft_ids)
        token = torch.where(inside, token, 0)  # among equal logits `max` may name any; the shift's zeros mean token 0
        if self._draft_index is None:
            return TeacherSlice(probabilities, full, token, plan.teacher_live[at])
        target = self._draft_index[token]
        # Where the draft vocabulary underflows to nothing its argmax is not in it either: the row is dead.
        return TeacherSlice(probabilities, full, target, plan.teacher_live[at] & (target >= 0))
