"""The loss over the vocabulary: teacher, draft logits, figures and gradients, one slice of positions at a time.

The rows that stand at one position share its teacher, so a slice is a few positions with all their rows: the teacher's
logits over V are made once for them. Nothing that is K or V wide outlives its slice; what is kept for the backward pass
is the gradient of the draft's states ``[rows, H]`` and of its LM head ``[K, H]``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from disagg_core.drafts.flex import compiles
from disagg_core.drafts.linear import bounded_, product, wide_product
from disagg_core.drafts.p_eagle.batch import RowPlan

_SLICE_BYTES = {"cpu": 8 * 1024**2, "cuda": 512 * 1024**2}
"""Bytes of one slice's draft logits in fp32, about."""
_TEACHER_BYTES = {"cpu": 64 * 1024**2, "cuda": 1024**3}
"""Bytes of one slice's teacher logits in fp32."""


@dataclass(frozen=True)
class Teacher:
    """Where the target's logits come from; takes no gradients."""

    states: Tensor  # [batch * tokens, H] after the final norm; without an LM head the logits [batch * tokens, V]
    lm_head: Tensor | None  # [V, H]
    draft_ids: Tensor | None  # [K] target ids of the draft's tokens, ascending; None: the whole vocabulary
    logit_cap: float | None = None

    def logits(self, flat: Tensor, work: torch.dtype) -> Tensor:
        """Return logits ``[n, V]`` of dtype `work` at the indices `flat` ``[n]``, in memory of their own."""
        states = self.states[flat]
        if self.lm_head is None:
            return states.to(work)
        return bounded_(wide_product(states.to(self.lm_head.dtype), self.lm_head.t(), work), self.logit_cap)


@dataclass(frozen=True)
class RowSums:
    """Sums over the trained rows of each depth, ``[D]`` fp32 (fp64 for fp64 drafts), and which rows counted."""

    cross_entropy: Tensor  # soft cross entropy
    correct: Tensor  # argmax of the draft is the target's
    counted: Tensor  # rows whose target token is in the draft vocabulary
    live: Tensor  # [rows] bool, the rows that were counted


def row_loss(
    plan: RowPlan,
    teacher: Teacher,
    lm_head: Tensor,
    normed: Tensor,
    divisor: Tensor | None,
    *,
    compiled: bool = False,
) -> tuple[Tensor, RowSums]:
    """Return the loss, a scalar that is differentiable by `lm_head` and `normed`, and the sums it was made of.

    With ``p = softmax(z[draft ids])`` of the teacher and the draft's ``q``, the loss is the sum of
    ``-sum_v p_v log q_v`` over the counted rows of all depths, divided by `divisor`.

    Args:
        plan: of the rows.
        teacher: of the positions.
        lm_head: the draft's, ``[K, H]``.
        normed: states after the final norm, ``[rows, H]``.
        divisor: scalar; by default the number of counted rows.
        compiled: fuse the passes over the vocabulary with `torch.compile`.
    """
    total, *sums = _RowLoss.apply(plan, teacher, divisor, compiled, lm_head, normed)  # type: ignore[no-untyped-call]
    return total, RowSums(*sums)


class _RowLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        plan: RowPlan,
        teacher: Teacher,
        divisor: Tensor | None,
        compiled: bool,
        lm_head: Tensor,
        normed: Tensor,
    ) -> tuple[Tensor, ...]:
        work = torch.float64 if lm_head.dtype == torch.float64 else torch.float32
        wanted = any(ctx.needs_input_grad)
        head_gradient = lm_head.new_zeros(lm_head.shape[::-1], dtype=work) if wanted else None
        state_gradient = torch.zeros_like(normed) if wanted else None
        sums = torch.zeros(3, len(plan.trained), dtype=work, device=normed.device)
        live = torch.zeros(len(normed), dtype=torch.bool, device=normed.device)
        walk = _Walk(plan, teacher, lm_head, work, compiled)
        for piece in walk.slices():
            rows = plan.live_rows[piece.rows]
            inputs = normed[rows]
            logits, known, figures = walk.run(piece, inputs)
            sums.index_add_(1, plan.live_depths[piece.rows], figures)
            live[rows] = known
            # The gradients are made here, while the logits are at hand, and only scaled in `backward`.
            if head_gradient is not None and state_gradient is not None:
                slope = logits.to(inputs.dtype)
                head_gradient += wide_product(inputs.t(), slope, work)
                state_gradient[rows] = product(slope, lm_head)
        divisor = sums[2].sum().clamp(min=1) if divisor is None else divisor.to(work)
        if head_gradient is not None and state_gradient is not None:
            ctx.save_for_backward(head_gradient.t().to(lm_head.dtype), state_gradient, divisor)
        by_depth = sums.unbind(0)
        ctx.mark_non_differentiable(*by_depth, live)
        return (sums[0].sum() / divisor, *by_depth, live)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        head, states, divisor = ctx.saved_tensors
        scale = grads[0] / divisor
        return None, None, None, None, head * scale.to(head.dtype), states * scale.to(states.dtype)


@dataclass(frozen=True)
class _Slice:
    """Teachers `teachers` of a plan and their live rows `rows`."""

    teachers: slice
    rows: slice


class _Walk:
    """Goes over the trained positions in slices."""

    def __init__(self, plan: RowPlan, teacher: Teacher, lm_head: Tensor, work: torch.dtype, compiled: bool) -> None:
        self._plan, self._teacher, self._lm_head, self._work = plan, teacher, lm_head, work
        compiled = compiled or compiles(lm_head.device)
        self._pass: Callable[..., tuple[Tensor, Tensor]] = _compiled_pass() if compiled else _to_slope
        self._draft_index: Tensor | None = None
        self._vocabulary = teacher.states.shape[1] if teacher.lm_head is None else teacher.lm_head.shape[0]
        if teacher.draft_ids is not None:
            index = torch.full((self._vocabulary,), -1, dtype=torch.int64, device=lm_head.device)
            self._draft_index = index.index_copy(0, teacher.draft_ids, torch.arange(len(lm_head), device=index.device))

    def slices(self) -> Iterator[_Slice]:
        """Cut the positions so that logits of teacher and rows keep to their budgets."""
        bounds, device = self._plan.teacher_bounds, self._lm_head.device.type
        most_rows = max(64, _SLICE_BYTES[device] // (4 * len(self._lm_head)))
        most_teachers = max(16, _TEACHER_BYTES[device] // (4 * self._vocabulary))
        start, count = 0, len(bounds) - 1
        while start < count:
            stop = start + 1
            while stop < count and stop - start < most_teachers and bounds[stop + 1] - bounds[start] <= most_rows:
                stop += 1
            yield _Slice(slice(start, stop), slice(bounds[start], bounds[stop]))
            start = stop

    def run(self, piece: _Slice, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return of a slice's rows the slope ``[m, K]`` of their losses by the logits, which counted, and the figures.

        Figures are ``[3, m]``: cross entropy, correct, counted.
        """
        probabilities, target = self._teach(piece)
        which = self._plan.live_teacher[piece.rows] - piece.teachers.start
        known = target[which] >= 0
        logits = wide_product(inputs, self._lm_head.t(), self._work)
        cross_entropy, token = self._pass(logits, probabilities[which], known)
        weight = known.to(self._work)
        figures = torch.stack((cross_entropy * weight, (token == target[which]) * weight, weight))
        return logits, known, figures

    def _teach(self, piece: _Slice) -> tuple[Tensor, Tensor]:
        """Return the teacher ``[n, K]`` over the draft vocabulary, and its argmax ``[n]`` as draft id, -1 for none."""
        logits = self._teacher.logits(self._plan.teacher_flat[piece.teachers], self._work)
        token = logits.argmax(-1)
        if self._teacher.draft_ids is None or self._draft_index is None:
            return logits.softmax(-1), token
        return logits[:, self._teacher.draft_ids].softmax(-1), self._draft_index[token]


def _to_slope(logits: Tensor, probabilities: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """Return cross entropy and argmax ``[m]``, and leave its slope by the logits in the memory of `logits` ``[m, K]``.

    The slope is ``q - p``, and 0 for rows that are not `known`.
    """
    top, token = logits.max(dim=-1)
    logits.sub_(top.unsqueeze(-1))
    agreement = torch.bmm(logits.unsqueeze(1), probabilities.unsqueeze(2)).flatten()
    total = logits.exp_().sum(-1)
    logits.div_(total.unsqueeze(-1)).sub_(probabilities).mul_(known.unsqueeze(-1))
    return total.log() - agreement, token


@cache
def _compiled_pass() -> Callable[..., tuple[Tensor, Tensor]]:
    return torch.compile(_to_slope, dynamic=True)
