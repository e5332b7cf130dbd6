"""Conditional-drop sampling (https://arxiv.org/abs/2602.01469): at which positions each depth is trained.

Depth 0 is trained everywhere. Each later depth goes on from the targets that the depth before it kept, moved by one,
and keeps a smaller share of them. So an anchor that is there at depth d is there at every depth before d.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """The rows of one sequence, depth after depth and ascending in each, as two int64 tensors ``[rows]``.

    The row of depth d with anchor a stands at position ``a + d`` and predicts the token two further on.
    """

    anchors: Tensor
    depths: Tensor


def kept_at(depth: int, valid: int, retention: float, least: float) -> int:
    """Return how many targets `depth` keeps of a sequence with `valid` positions to train on."""
    return int(max(0, valid - depth) * max(retention**depth, least))


def sample_rows(mask: Tensor, depths: int, retention: float, least: float, generator: torch.Generator) -> Rows:
    """Return the rows of a sequence.

    Args:
        mask: ``[tokens]``, not 0 where a row may be trained.
        depths: D; there are fewer where a depth would keep nothing.
        retention: r.
        least: the smallest share that r to the power of the depth falls to.
        generator: of the draw.
    """
    live = mask != 0
    valid = int(live.sum())
    anchors, sizes = [torch.arange(live.numel())], [live.numel()]
    targets = live.nonzero().flatten()
    for depth in range(1, depths):
        targets = targets[targets >= depth]
        count = kept_at(depth, valid, retention, least)
        if count == 0:
            break
        if len(targets) > count:
            targets = targets[torch.randperm(len(targets), generator=generator)[:count]].sort().values
        anchors.append(targets - depth)
        sizes.append(len(targets))
        following = targets[targets + 1 < live.numel()] + 1
        targets = following[live[following]]
    return Rows(torch.cat(anchors), torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)))
