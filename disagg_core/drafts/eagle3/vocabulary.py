"""The passes over a slice's vocabulary: what of logits becomes figures, and the slope of the loss by them.

On a CPU they run step by step in the memory of the logits, a slice of which stays in the cache. Compiled, which they
always are on CUDA, the logits of all steps are read, and nothing K wide is written but the slope, in the dtype of the
products that follow: on an H200 a quarter of the time that the passes take one by one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from disagg_core.drafts.flex import compiles


@dataclass(frozen=True)
class Slopes:
    """Derivatives of the total by the sums of each step, ``[L]``; None where they are zero."""

    cross_entropy: Tensor | None
    accepted: Tensor | None
    log_accepted: Tensor | None

    def of_step(self, k: int) -> Slopes:
        """Return those of step k, scalars."""
        slopes = (self.cross_entropy, self.accepted, self.log_accepted)
        return Slopes(*(None if slope is None else slope[k] for slope in slopes))


@dataclass(frozen=True)
class TeacherSlice:
    """Teacher of ``n`` rows."""

    probabilities: Tensor  # [n, K] over the draft vocabulary
    full: Tensor  # [n, K] p_full, over the whole vocabulary; the same tensor when that is the draft's
    target: Tensor  # [n] draft id of the argmax
    live: Tensor  # [n] position mask


class Passes(Protocol):
    """Both passes of a slice of n positions; the memory of the logits is theirs."""

    def of_teacher(self, logits: Tensor, draft_ids: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``p`` and ``p_full`` ``[n, K]`` and the argmax ``[n]`` of the target's logits ``[n, V]``.

        `draft_ids` ``[K]`` are the draft's tokens; None: all.
        """
        ...

    def of_draft(
        self, logits: Tensor, teacher: TeacherSlice, weight: Tensor, slopes: Slopes | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor | None]:
        """Return the weighted sums of each step ``[L, 5]`` and, with `slopes`, the slope of the total by the logits.

        `logits` is ``[L, n, K]``, as is the slope, in `dtype`; `weight` ``[L, n]`` is 1 for live positions and 0 for
        dead ones. The sums are those of `StepSums`, in its order.
        """
        ...


def passes_on(device: torch.device, *, compiled: bool) -> Passes:
    """Return the passes for tensors on `device`."""
    return FusedPasses() if compiled or compiles(device) else InPlacePasses()


class InPlacePasses:
    """Step by step, in the memory of the logits."""

    def of_teacher(self, logits: Tensor, draft_ids: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """See `Passes`."""
        top, token = logits.max(dim=-1)
        if draft_ids is None:
            probabilities = logits.sub_(top.unsqueeze(-1)).exp_()
            probabilities /= probabilities.sum(-1, keepdim=True)
            return probabilities, probabilities, token
        chosen = (logits[:, draft_ids] - top.unsqueeze(-1)).exp_()
        everything = logits.sub_(top.unsqueeze(-1)).exp_().sum(-1, keepdim=True)
        return chosen / _total(chosen), chosen / everything, token

    def of_draft(
        self, logits: Tensor, teacher: TeacherSlice, weight: Tensor, slopes: Slopes | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor | None]:
        """See `Passes`."""
        sums = []
        for k, step in enumerate(logits):
            sums.append(_figures(step, teacher, weight[k]))
            if slopes is not None:
                _to_slope(step, teacher, weight[k], slopes.of_step(k))
        return torch.stack(sums), None if slopes is None else logits.to(dtype)


class FusedPasses:
    """Compiled; no intermediate result is as wide as the vocabulary."""

    def of_teacher(self, logits: Tensor, draft_ids: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """See `Passes`."""
        probabilities, full, token = _compiled_teacher()(logits, draft_ids)
        return probabilities, probabilities if draft_ids is None else full, token

    def of_draft(
        self, logits: Tensor, teacher: TeacherSlice, weight: Tensor, slopes: Slopes | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor | None]:
        """See `Passes`."""
        by = None if slopes is None else (slopes.cross_entropy, slopes.accepted, slopes.log_accepted)
        sums, slope = _compiled_draft()(logits, teacher.probabilities, teacher.full, teacher.target, weight, by, dtype)
        return sums, slope


def _total(chosen: Tensor) -> Tensor:
    return chosen.sum(-1, keepdim=True).clamp(min=torch.finfo(chosen.dtype).tiny)


def _figures(logits: Tensor, teacher: TeacherSlice, weight: Tensor) -> Tensor:
    """Return the weighted sums of one step, ``[5]``, and leave ``q = softmax(logits)`` in the memory of `logits`.

    ``logits`` is ``[n, K]``; ``weight`` ``[n]`` is 1 for live positions and 0 for dead ones.
    """
    top, token = logits.max(dim=-1)
    logits.sub_(top.unsqueeze(-1))
    # p sums to one, so the cross entropy is the log of the total less this: no second pass for the log-softmax.
    agreement = torch.bmm(logits.unsqueeze(1), teacher.probabilities.unsqueeze(2)).flatten()
    q = logits.exp_()
    total = q.sum(-1)
    q.div_(total.unsqueeze(-1))
    accepted = _accepted(q, teacher)
    correct = (token == teacher.target).to(weight.dtype)
    return torch.stack((total.log() - agreement, accepted, accepted.log(), correct, torch.ones_like(correct))) @ weight


def _accepted(q: Tensor, teacher: TeacherSlice) -> Tensor:
    """Return ``a = sum_v min(p_full, q)`` of each position, ``[n]``, kept above zero for its logarithm."""
    return torch.minimum(teacher.full, q).sum(-1).clamp(min=torch.finfo(q.dtype).tiny)


def _to_slope(q: Tensor, teacher: TeacherSlice, weight: Tensor, slopes: Slopes) -> None:
    """Turn `q` ``[n, K]`` into the slope of the total by the logits of one step, in place.

    Cross entropy by logits: ``q - p``. Accepted mass ``a = sum_v min(p_full, q)`` by logits, with
    ``below = [q < p_full]``: ``q (below - sum_v below q)``, and that over ``a`` for its logarithm.
    """
    by_mass = slopes.accepted
    if slopes.log_accepted is not None:
        by_mass = slopes.log_accepted / _accepted(q, teacher)
    by_accepted: Tensor | None = None
    if by_mass is not None:
        below = q.lt(teacher.full)
        kept = torch.where(below, q, 0)
        by_accepted = kept.sub_(q * kept.sum(-1, keepdim=True)).mul_((by_mass * weight).unsqueeze(-1))
    if slopes.cross_entropy is None:
        q.zero_()
    else:
        q.sub_(teacher.probabilities).mul_((slopes.cross_entropy * weight).unsqueeze(-1))
    if by_accepted is not None:
        q.add_(by_accepted)


def fused_teacher(logits: Tensor, draft_ids: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `Passes.of_teacher` without changing the logits; both probabilities are there in any case."""
    top, token = logits.max(dim=-1)
    top = top.unsqueeze(-1)
    everything = (logits - top).exp().sum(-1, keepdim=True)
    chosen = (logits if draft_ids is None else logits[:, draft_ids]) - top
    chosen = chosen.exp()
    return chosen / _total(chosen), chosen / everything, token


def fused_draft(
    logits: Tensor,
    probabilities: Tensor,
    full: Tensor,
    target: Tensor,
    weight: Tensor,
    slopes: tuple[Tensor | None, Tensor | None, Tensor | None] | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """Compute `Passes.of_draft` without changing the logits; formulas as in `_figures` and `_to_slope`."""
    top, token = logits.max(dim=-1)
    shifted = logits - top.unsqueeze(-1)
    total = shifted.exp().sum(-1)
    q = shifted.exp() / total.unsqueeze(-1)
    cross_entropy = total.log() - (probabilities * shifted).sum(-1)
    accepted = torch.minimum(full, q).sum(-1).clamp(min=torch.finfo(logits.dtype).tiny)
    correct = (token == target).to(weight.dtype)
    figures = torch.stack((cross_entropy, accepted, accepted.log(), correct, torch.ones_like(correct)))
    sums = (figures * weight).sum(-1).t()
    if slopes is None:
        return sums, None
    by_entropy, by_accepted, by_log = slopes
    slope = torch.zeros_like(q)
    if by_entropy is not None:
        slope = slope + (q - probabilities) * (by_entropy.unsqueeze(-1) * weight).unsqueeze(-1)
    by_mass = None if by_accepted is None else by_accepted.unsqueeze(-1) * weight
    if by_log is not None:
        by_mass = by_log.unsqueeze(-1) * weight / accepted
    if by_mass is not None:
        kept = torch.where(q < full, q, 0)
        slope = slope + (kept - q * kept.sum(-1, keepdim=True)) * by_mass.unsqueeze(-1)
    return sums, slope.to(dtype)


@cache
def _compiled_teacher() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    return torch.compile(fused_teacher)


@cache
def _compiled_draft() -> Callable[..., tuple[Tensor, Tensor | None]]:
    return torch.compile(fused_draft)
