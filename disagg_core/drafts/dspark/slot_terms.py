"""Cross entropy and L1 distance of the trained slots over the vocabulary, with their gradient, a few slots at a time.

A slot's logits are ``lm_head h + w2 m``, with its state h and the Markov head's vector m (a factor that the target has
on its logits, and that engines do not give a draft's, is taken out of ``lm_head h``). With ``q`` their softmax and
``p`` the target's, the gradient by the logits is ``q - onehot`` for the cross entropy, and for ``sum_v |q - p|`` with
``s = sign(q - p)`` it is ``q (s - sum_v s q)``. Draft's and target's logits of a slice of slots are made, reduced to
figures, turned into the gradient in the same memory and reduced to the gradients of h, m and w2. Nothing that is V wide
outlives its slice but the gradient of w2, ``[V, r]``. LM head and target take no gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from disagg_core.drafts.linear import bounded_, outer, product, wide_product

_SLICE_BYTES = {"cpu": 8 * 1024**2, "cuda": 1024**3}
"""Bytes of one slice's logits, the draft's and the target's, in fp32."""


@dataclass(frozen=True)
class Teaching:
    """What the R trained slots are compared with, and how much each weighs."""

    labels: Tensor  # [R] int64
    states: Tensor  # [R, H] the target's, after its final norm
    lm_head: Tensor  # [V, H]
    weights: Tensor  # [R]
    cross_entropy: float  # weight of the term
    distance: float  # likewise
    head_scale: float = 1.0  # factor of the LM head that is the target's logits' only
    logit_cap: float | None = None  # bound of the target's logits


@dataclass(frozen=True)
class SlotTerms:
    """Results for the R trained slots; only `total` takes gradients."""

    total: Tensor  # scalar: sum of weights * (both terms, weighted)
    cross_entropy: Tensor  # [R]
    distance: Tensor  # [R] sum_v |q - p|
    predicted: Tensor  # [R] argmax


def slot_terms(hidden: Tensor, vectors: Tensor, matrix: Tensor, teaching: Teaching) -> SlotTerms:
    """Return the terms of R slots.

    Args:
        hidden: states after the final norm, ``[R, H]``.
        vectors: the Markov head's, ``[R, r]``.
        matrix: w2, ``[V, r]``.
        teaching: labels, teacher and weights.
    """
    return SlotTerms(*_SlotTerms.apply(teaching, hidden, vectors, matrix))  # type: ignore[no-untyped-call]


class _SlotTerms(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, teaching: Teaching, hidden: Tensor, vectors: Tensor, matrix: Tensor) -> tuple[Tensor, ...]:
        work = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        head, matrix = teaching.lm_head.to(hidden.dtype), matrix.to(hidden.dtype)
        rows, (vocabulary, rank) = len(hidden), matrix.shape
        cross_entropy, distance = hidden.new_zeros(2, rows, dtype=work)
        predicted = teaching.labels.new_zeros(rows)
        needed = any(ctx.needs_input_grad[1:])
        by_hidden, by_vectors = torch.zeros_like(hidden), torch.zeros_like(vectors)
        by_matrix = matrix.new_zeros((vocabulary, rank) if needed else (0, rank), dtype=work)
        most = max(1, _SLICE_BYTES[hidden.device.type] // (8 * vocabulary))
        for start in range(0, rows, most):
            at = slice(start, start + most)
            logits = wide_product(hidden[at], head.t(), work).div_(teaching.head_scale)
            logits.add_(wide_product(vectors[at], matrix.t(), work))
            target = wide_product(teaching.states[at].to(head.dtype), head.t(), work)
            bounded_(target, teaching.logit_cap)
            cross_entropy[at], predicted[at] = _to_probabilities(logits, teaching.labels[at])
            _to_probabilities(target, teaching.labels[at])
            difference = target.sub_(logits)
            distance[at] = torch.linalg.vector_norm(difference, ord=1, dim=-1)
            if needed:
                slope = _slope(logits, difference, teaching, at).to(hidden.dtype)
                by_hidden[at], by_vectors[at] = product(slope, head).div_(teaching.head_scale), product(slope, matrix)
                by_matrix += outer(slope, vectors[at])
        ctx.save_for_backward(by_hidden, by_vectors, by_matrix)
        ctx.mark_non_differentiable(cross_entropy, distance, predicted)
        terms = teaching.cross_entropy * cross_entropy + teaching.distance * distance
        return (teaching.weights * terms).sum(), cross_entropy, distance, predicted

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        by_hidden, by_vectors, by_matrix = ctx.saved_tensors
        scale = grads[0].to(by_hidden.dtype)
        return None, by_hidden * scale, by_vectors * scale, (by_matrix * scale).to(by_hidden.dtype)


def _to_probabilities(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return cross entropy and argmax ``[n]``, and leave ``softmax(logits)`` in the memory of `logits` ``[n, V]``."""
    top, predicted = logits.max(dim=-1)
    wanted = logits.gather(1, labels[:, None]).squeeze(1)
    total = logits.sub_(top[:, None]).exp_().sum(-1)
    logits.div_(total[:, None])
    return total.log() + top - wanted, predicted


def _slope(q: Tensor, difference: Tensor, teaching: Teaching, at: slice) -> Tensor:
    """Return the gradient of the weighted terms by the logits, in the memory of `difference`, which is ``p - q``."""
    weights = teaching.weights[at, None].to(q.dtype)
    sign = difference.sign_().neg_()
    mean = torch.bmm(sign[:, None], q[:, :, None]).squeeze(1)
    slope = sign.sub_(mean).mul_(teaching.distance).add_(teaching.cross_entropy).mul_(weights).mul_(q)
    return slope.scatter_add_(1, teaching.labels[at, None], -teaching.cross_entropy * weights)
