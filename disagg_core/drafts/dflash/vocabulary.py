"""Passes over logits that fuse: what a slot needs to know of its whole vocabulary is read once.

The first pass reduces chunks of the vocabulary, of which logsumexp, argmax and the most likely tokens follow without
another look at all of it. The second writes the gradient, in the dtype that it is multiplied in. Nothing else that is V
wide is written. Logits ``[n, V]`` are a product with the LM head that `Head` has yet to shape.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_CHUNK = 128
"""Tokens of a chunk: its maximum stands for so many logits."""


@dataclass(frozen=True)
class Head:
    """The target's LM head ``[V, H]``, with the draft's factor and soft cap on the logits."""

    weight: Tensor
    multiplier: float = 1.0
    cap: float | None = None

    @property
    def plain(self) -> bool:
        """Whether logits are the product alone."""
        return self.multiplier == 1.0 and self.cap is None

    def shaped_(self, logits: Tensor) -> Tensor:
        """Return `logits` with factor and cap, in the same memory."""
        logits.mul_(self.multiplier)
        return logits if self.cap is None else logits.div_(self.cap).tanh_().mul_(self.cap)

    def slope(self, shaped: Tensor) -> Tensor | float:
        """Return the derivative of shaped logits by the product."""
        return slope_of(shaped, self.multiplier, self.cap)


def shaped(product: Tensor, multiplier: float, cap: float | None) -> Tensor:
    """Return the logits of a product with the LM head, of any shape: with factor and soft cap."""
    logits = product if multiplier == 1.0 else product * multiplier
    return logits if cap is None else (logits / cap).tanh() * cap


def slope_of(logits: Tensor, multiplier: float, cap: float | None) -> Tensor | float:
    """Return the derivative of `shaped` logits by the product."""
    return multiplier if cap is None else multiplier * (1 - (logits / cap) ** 2)


class Reading(NamedTuple):
    """What a slot needs to know of its logits."""

    logsumexp: Tensor  # [n]
    label_logit: Tensor  # [n]
    predicted: Tensor  # [n] argmax
    candidate_logits: Tensor  # [n, C] the largest, the largest first
    candidate_ids: Tensor  # [n, C]


def read(product: Tensor, labels: Tensor, candidates: int, multiplier: float, cap: float | None) -> Reading:
    """Return what `labels` ``[n]`` and C `candidates` ask of the logits."""
    chunks = _chunked(shaped(product, multiplier, cap))
    maxima = chunks.amax(-1)
    sums = (chunks - maxima[..., None]).exp().sum(-1)
    top = maxima.amax(-1, keepdim=True)
    logsumexp = top.squeeze(1) + (sums * (maxima - top).exp()).sum(-1).log()
    label_logit = shaped(product.gather(1, labels[:, None]), multiplier, cap).squeeze(1)
    within, ids = _members(product, maxima.argmax(-1, keepdim=True), multiplier, cap)
    predicted = ids.gather(1, within.argmax(-1, keepdim=True)).squeeze(1)
    return Reading(logsumexp, label_logit, predicted, *_largest(product, maxima, candidates, multiplier, cap))


def slope(
    product: Tensor,
    labels: Tensor,
    logsumexp: Tensor,
    weights: Tensor,
    multiplier: float,
    cap: float | None,
    dtype: torch.dtype,
) -> Tensor:
    """Return the gradient of the weighted cross entropies ``[n]`` by `product`, ``[n, V]`` in `dtype`."""
    logits = shaped(product, multiplier, cap)
    label = torch.arange(product.shape[1], device=product.device) == labels[:, None]
    by_logits = ((logits - logsumexp[:, None]).exp() - label.to(logits.dtype)) * weights[:, None]
    return (by_logits * slope_of(logits, multiplier, cap)).to(dtype)


def _largest(
    product: Tensor, maxima: Tensor, count: int, multiplier: float, cap: float | None
) -> tuple[Tensor, Tensor]:
    """Return the `count` largest logits and their ids, each ``[n, count]``, the largest first.

    The chunks with the largest `maxima` ``[n, chunks]`` hold them: each has one that is no smaller than any outside.
    """
    if not count:
        return product.new_empty(len(product), 0), maxima.new_empty(len(product), 0, dtype=torch.int64)
    if maxima.shape[1] <= count:
        return shaped(product, multiplier, cap).topk(count)
    within, ids = _members(product, maxima.topk(count, sorted=False).indices, multiplier, cap)
    values, places = within.topk(count)
    return values, ids.gather(1, places)


def _members(product: Tensor, chunks: Tensor, multiplier: float, cap: float | None) -> tuple[Tensor, Tensor]:
    """Return the logits of `chunks` ``[n, c]``, -inf beyond the vocabulary, and their ids, each ``[n, c * chunk]``."""
    ids = (chunks[..., None] * _CHUNK + torch.arange(_CHUNK, device=chunks.device)).flatten(1)
    last = product.shape[1] - 1
    logits = shaped(product.gather(1, ids.clamp(max=last)), multiplier, cap)
    return torch.where(ids <= last, logits, -math.inf), ids


def _chunked(logits: Tensor) -> Tensor:
    """Return `logits` ``[n, V]`` as ``[n, chunks, chunk]``, the last chunk filled up with -inf."""
    missing = -logits.shape[1] % _CHUNK
    whole = F.pad(logits, (0, missing), value=-math.inf) if missing else logits
    return torch.unflatten(whole, 1, (-1, _CHUNK))
