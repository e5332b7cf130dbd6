"""What a training step is given: DFlash's batch and blocks, with labels one token further.

Slot s of the block with anchor p stands at position p + s, knows which token stands there, and predicts the one at
p + s + 1. A block is trained up to its first slot whose label is not, or lies beyond the end.
"""

from __future__ import annotations

import torch
from torch import Tensor

from disagg_core.drafts.dflash.batch import BlockBatcher, DFlashBatch
from disagg_core.drafts.dspark.config import DSparkConfig
from disagg_core.drafts.dspark.options import DSparkLossSection, DSparkSection
from disagg_core.drafts.method import Batch


def shifted_mask(batch: DFlashBatch, block_size: int) -> Tensor:
    """Return which slots are trained, bool ``[batch, blocks, K]``: those before the first untrained label."""
    tokens = batch.loss_mask.shape[1]
    positions = batch.anchors[:, :, None] + torch.arange(block_size) + 1
    inside = positions.clamp(max=tokens - 1)
    trained = (batch.loss_mask != 0).gather(1, inside.flatten(1)).view(positions.shape)
    return (batch.block_keep[:, :, None] & (positions < tokens) & trained).cumprod(2).bool()


def decay(block_size: int, gamma: float) -> Tensor:
    """Return the weight of each slot, fp64 ``[K]``: ``exp(-s / gamma)``."""
    return (-torch.arange(block_size, dtype=torch.float64) / gamma).exp()


def divisor(mask: Tensor, loss: DSparkLossSection) -> Tensor:
    """Return what trained slots ``[batch, blocks, K]`` add to the divisor of every term, fp64 scalar."""
    counted = mask.flatten(0, 1).sum(0).double()
    return counted.sum() if loss.normalisation == "positions" else (counted * decay(mask.shape[2], loss.gamma)).sum()


class DSparkBatcher(BlockBatcher):
    """A `BlockBatcher` for DSpark's loss, which always needs the target's last state."""

    def __init__(self, options: DSparkSection, config: DSparkConfig, *, seed: int) -> None:
        super().__init__(options, config, seed=seed, last_state=True)
        self._loss = options.loss

    def slot_mask(self, batch: DFlashBatch) -> Tensor:
        """Return which slots are trained, bool ``[batch, blocks, K]``."""
        return shifted_mask(batch, self._config.block_size)

    def normalisers(self, batch: Batch | None) -> dict[str, float]:
        """Return what `batch` adds to the number that the window's terms are divided by, as ``loss``."""
        if batch is None:
            return {"loss": 0.0}
        assert isinstance(batch, DFlashBatch)
        return {"loss": float(divisor(self.slot_mask(batch), self._loss))}
