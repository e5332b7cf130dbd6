"""The cross entropy of the trained slots over the vocabulary, with its gradient, a few blocks at a time.

Logits of a slice of blocks are made, reduced to a cross entropy and an argmax for each slot, turned into their own
gradient in the same memory and reduced to the gradient of the states. Nothing that is V wide outlives its slice. The LM
head is frozen and takes no gradient. A slice holds whole blocks, because D-PACE weighs a slot by its block's others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from disagg_core.drafts import flex
from disagg_core.drafts.dflash import vocabulary
from disagg_core.drafts.dflash.batch import BlockPlan
from disagg_core.drafts.dflash.options import LossType
from disagg_core.drafts.dflash.vocabulary import Head
from disagg_core.drafts.flex import compiled
from disagg_core.drafts.linear import product, wide_product

_SLICE_BYTES = {"cpu": 4 * 1024**2, "cuda": 512 * 1024**2}
"""Bytes of one slice's logits in fp32."""


@dataclass(frozen=True)
class SlotWeights:
    """How much the slots of a block weigh; formulas in `disagg_core.drafts.dflash.loss`."""

    type: LossType
    decay: Tensor  # [K], of type dflash
    alpha: float  # of D-PACE

    def of(self, cross_entropy: Tensor, mask: Tensor) -> Tensor:
        """Return the weights ``[m, K]`` of slots with these cross entropies; 0 where the 0/1 `mask` is."""
        if self.type == "dflash":
            return mask * self.decay.to(mask)
        smoothed = (1 - self.alpha) * (-cross_entropy).exp() + self.alpha
        prefix = torch.where(mask != 0, smoothed, 1).cumprod(-1)
        if self.type == "dpace_prefix":
            return mask * prefix
        suffix = (prefix * mask).flip(-1).cumsum(-1).flip(-1)
        if self.type == "dpace_continuation":
            suffix = suffix / prefix.clamp(min=torch.finfo(prefix.dtype).tiny)
        return mask * suffix


@dataclass(frozen=True)
class SlotLoss:
    """Results for the R trained slots, in the order of `BlockPlan.trained_flat`.

    `total` and `candidate_logits` take gradients. Candidates are the C most likely tokens, the most likely first.
    """

    total: Tensor  # scalar: sum of weights * cross_entropy / divisor
    cross_entropy: Tensor  # [R]
    predicted: Tensor  # [R] argmax
    weights: Tensor  # [R]
    candidate_ids: Tensor  # [R, C]
    candidate_logits: Tensor  # [R, C]
    recalled: Tensor  # [R] bool, the label is one of the C most likely


def slot_loss(
    hidden: Tensor,
    plan: BlockPlan,
    labels: Tensor,
    head: Head,
    weights: SlotWeights,
    divisor: Tensor,
    *,
    candidates: int = 0,
    with_labels: bool = False,
    compiled: bool = False,
) -> SlotLoss:
    """Return the loss of the trained slots.

    Args:
        hidden: states after the final norm, ``[M, K, H]``.
        plan: the batch's blocks.
        labels: ``[M, K]`` int64.
        head: the target's.
        weights: of the slots.
        divisor: of the sum, scalar.
        candidates: C.
        with_labels: put a slot's label in the place of its last candidate if it is not among them.
        compiled: fuse the passes over the vocabulary with `torch.compile`, as a GPU always does.
    """
    job = _Job(plan, labels, head, weights, divisor, candidates, with_labels, compiled)
    results = _SlotLoss.apply(job, hidden)  # type: ignore[no-untyped-call]
    return SlotLoss(*results)


@dataclass(frozen=True)
class _Job:
    """Everything of a loss but the states."""

    plan: BlockPlan
    labels: Tensor
    head: Head
    weights: SlotWeights
    divisor: Tensor
    candidates: int
    with_labels: bool
    compiled: bool


class _SlotLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, job: _Job, hidden: Tensor) -> tuple[Tensor, ...]:
        plan, rows = job.plan, len(job.plan.trained_flat)
        work = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        cross_entropy, weights = hidden.new_zeros(2, rows, dtype=work)
        predicted = plan.trained_flat.new_zeros(rows)
        ids = plan.trained_flat.new_zeros(rows, job.candidates)
        logits = hidden.new_zeros(rows, job.candidates, dtype=work)
        recalled = torch.zeros_like(predicted, dtype=torch.bool)
        gradient = hidden.new_zeros(rows, hidden.shape[-1]) if ctx.needs_input_grad[1] else None
        states = hidden.flatten(0, 1)
        for blocks, at in _slices(plan.trained, job.head.weight.shape[0], hidden.device.type):
            chosen = plan.trained_flat[at]
            piece = _slice(job, states[chosen], job.labels.flatten()[chosen], work)
            cross_entropy[at], predicted[at] = piece.cross_entropy, piece.predicted
            ids[at], logits[at], recalled[at] = piece.candidate_ids, piece.candidate_logits, piece.recalled
            weights[at] = _weights_of(job, piece.cross_entropy, blocks, chosen)
            if gradient is not None:
                gradient[at] = piece.gradient(weights[at] / job.divisor)
        ctx.job, ctx.shape = job, hidden.shape
        ctx.save_for_backward(gradient, ids, logits)
        ctx.mark_non_differentiable(cross_entropy, predicted, weights, ids, recalled)
        total = (weights * cross_entropy).sum() / job.divisor
        return total, cross_entropy, predicted, weights, ids, logits, recalled

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        gradient, ids, logits = ctx.saved_tensors
        by_total, by_logits, head = grads[0], grads[5], ctx.job.head
        by_rows = gradient * by_total.to(gradient.dtype)
        if ids.shape[1]:
            slope = (by_logits * head.slope(logits)).to(gradient.dtype)
            weight = head.weight.to(gradient.dtype)
            by_rows += F.embedding_bag(ids, weight, per_sample_weights=slope, mode="sum")
        by_states = gradient.new_zeros(ctx.shape).flatten(0, 1).index_copy(0, ctx.job.plan.trained_flat, by_rows)
        return None, by_states.view(ctx.shape)


def _slices(trained: Sequence[int], vocabulary: int, device: str) -> Iterator[tuple[slice, slice]]:
    """Cut the blocks; of each slice give the blocks and their trained slots."""
    most = max(1, _SLICE_BYTES[device] // (4 * vocabulary))
    block = row = 0
    while block < len(trained):
        last, end = block + 1, row + trained[block]
        while last < len(trained) and end + trained[last] - row <= most:
            end += trained[last]
            last += 1
        yield slice(block, last), slice(row, end)
        block, row = last, end


def _weights_of(job: _Job, cross_entropy: Tensor, blocks: slice, chosen: Tensor) -> Tensor:
    """Return the weights of the trained slots `chosen` of `blocks`."""
    mask = job.plan.mask[blocks].to(cross_entropy.dtype)
    places = chosen - blocks.start * job.plan.block_size
    by_slot = torch.zeros_like(mask).flatten().index_copy(0, places, cross_entropy).view(mask.shape)
    return job.weights.of(by_slot, mask).flatten()[places]


class _Slice(Protocol):
    """The vocabulary pass over n slots."""

    cross_entropy: Tensor  # [n]
    predicted: Tensor  # [n]
    candidate_ids: Tensor  # [n, C]
    candidate_logits: Tensor  # [n, C]
    recalled: Tensor  # [n] bool

    def gradient(self, weights: Tensor) -> Tensor:
        """Return the gradient by the states ``[n, H]`` of the cross entropies, each times its weight ``[n]``."""


def _slice(job: _Job, states: Tensor, labels: Tensor, work: torch.dtype) -> _Slice:
    logits = wide_product(states, job.head.weight.to(states.dtype).t(), work)
    fuses = job.compiled or flex.compiles(states.device)
    return _FusedSlice(job, logits, labels) if fuses else _SliceInPlace(job, logits, labels)


class _SliceInPlace:
    """A `_Slice` whose only tensor that is V wide are the logits, which are not shaped yet, or of two with a cap."""

    def __init__(self, job: _Job, logits: Tensor, labels: Tensor) -> None:
        self._head, self._labels = job.head, labels
        self._slope: Tensor | float = 1.0
        if not job.head.plain:
            self._slope = job.head.slope(job.head.shaped_(logits))
        values, ids = logits.topk(job.candidates) if job.candidates else (logits[:, :0], labels[:, None][:, :0])
        self.recalled = (ids == labels[:, None]).any(1)
        if job.with_labels:
            ids[:, -1] = torch.where(self.recalled, ids[:, -1], labels)
            values = logits.gather(1, ids)
        self.candidate_ids, self.candidate_logits = ids, values
        self.cross_entropy, self.predicted = _to_probabilities(logits, labels)
        self._probabilities = logits

    def gradient(self, weights: Tensor) -> Tensor:
        """Return the gradient by the states ``[n, H]``; see `_Slice`."""
        slope = self._probabilities.mul_(weights[:, None])
        slope.scatter_add_(1, self._labels[:, None], -weights[:, None].to(slope.dtype))
        if not self._head.plain:
            slope.mul_(self._slope)
        weight = self._head.weight
        dtype = torch.float64 if slope.dtype == torch.float64 else weight.dtype
        return product(slope.to(dtype), weight.to(dtype))


class _FusedSlice:
    """A `_Slice` that reads its logits, which are not shaped yet, once for the figures and once for the gradient."""

    def __init__(self, job: _Job, logits: Tensor, labels: Tensor) -> None:
        self._head, self._labels, self._logits = job.head, labels, logits
        flex.rows_vary(logits, labels)
        found = compiled(vocabulary.read)(logits, labels, job.candidates, job.head.multiplier, job.head.cap)
        self._logsumexp, self.predicted = found.logsumexp, found.predicted
        self.cross_entropy = found.logsumexp - found.label_logit
        values, ids = found.candidate_logits, found.candidate_ids
        self.recalled = (ids == labels[:, None]).any(1)
        if job.with_labels:
            ids[:, -1] = torch.where(self.recalled, ids[:, -1], labels)
            values[:, -1] = torch.where(self.recalled, values[:, -1], found.label_logit)
        self.candidate_ids, self.candidate_logits = ids, values

    def gradient(self, weights: Tensor) -> Tensor:
        """Return the gradient by the states ``[n, H]``; see `_Slice`."""
        head = self._head
        dtype = torch.float64 if self._logits.dtype == torch.float64 else head.weight.dtype
        flex.rows_vary(self._logsumexp, weights)
        slope = compiled(vocabulary.slope)(
            self._logits, self._labels, self._logsumexp, weights, head.multiplier, head.cap, dtype
        )
        return product(slope, head.weight.to(dtype))


def _to_probabilities(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return cross entropy and argmax ``[n]``, and leave ``softmax(logits)`` in the memory of `logits` ``[n, V]``."""
    top, predicted = logits.max(dim=-1)
    wanted = logits.gather(1, labels[:, None]).squeeze(1)
    logits.sub_(top[:, None]).exp_()
    total = logits.sum(-1)
    logits.div_(total[:, None])
    return total.log() + top - wanted, predicted
