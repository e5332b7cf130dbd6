"""Where the blocks of a sample begin: positions drawn by the run's seed and the sample's id, and by nothing else."""

from __future__ import annotations

import torch
from torch import Tensor


def candidates(loss_mask: Tensor) -> Tensor:
    """Return the positions ``[n]`` where a block may begin: they and the next one are trained on (``[tokens]``)."""
    trained = loss_mask != 0
    return (trained[:-1] & trained[1:]).nonzero().flatten()


def draw_anchors(loss_mask: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Return up to `count` of the `candidates`, ascending int64, all of them equally likely and none twice."""
    found = candidates(loss_mask)
    return found[torch.randperm(len(found), generator=generator)[:count]].sort().values


def stacked(anchors: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the rows' `anchors` as one tensor int64 ``[batch, n]`` and which of its entries are blocks, bool.

    Rows with fewer anchors are filled up at the end with 0.
    """
    width = max(1, *(len(row) for row in anchors)) if anchors else 1
    positions = torch.zeros(len(anchors), width, dtype=torch.int64)
    keep = torch.zeros(len(anchors), width, dtype=torch.bool)
    for row, found in enumerate(anchors):
        positions[row, : len(found)] = found
        keep[row, : len(found)] = True
    return positions, keep
