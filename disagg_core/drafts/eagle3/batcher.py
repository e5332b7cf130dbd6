"""Batches of captured samples for the training-time test."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from disagg_core.drafts.eagle3.batch import Eagle3Batch, count_valid_positions
from disagg_core.drafts.eagle3.options import LossSection
from disagg_core.drafts.eagle_layers import COUNT
from disagg_core.drafts.method import Batch, Batcher, Sample

_DUMMY_TOKENS = 4


class Eagle3Batcher(Batcher):
    """Pads samples on the right; nothing is random. `target_hidden` is H_t."""

    def __init__(self, loss: LossSection, target_hidden: int) -> None:
        self._loss = loss
        self._target_hidden = target_hidden
        self.by_length = loss.normalisation == "valid"

    def collate(self, samples: Sequence[Sample], *, multiple_of: int = 1) -> Eagle3Batch:
        """Return `samples` as one batch; padding is zero everywhere, hidden states keep their dtype."""
        lengths = [len(sample) for sample in samples]
        width = -(-max(lengths) // multiple_of) * multiple_of

        def padded(name: str, dtype: torch.dtype | None = None) -> Tensor:
            like = samples[0].tensors[name]
            rows = torch.zeros(len(samples), width, *like.shape[1:], dtype=dtype or like.dtype)
            for row, sample, length in zip(rows, samples, lengths, strict=True):
                row[:length] = sample.tensors[name]
            return rows

        return Eagle3Batch(
            input_ids=padded("input_ids", torch.int64),
            attention_mask=torch.arange(width)[None, :] < torch.tensor(lengths)[:, None],
            loss_mask=padded("loss_mask", torch.bool),
            aux_hidden_states=padded("aux_hidden_states"),
            last_hidden_state=padded("last_hidden_state"),
        )

    def dummy(self) -> Eagle3Batch:
        """Return one short sample with nothing to train on."""
        shape = (1, _DUMMY_TOKENS)
        return Eagle3Batch(
            input_ids=torch.zeros(shape, dtype=torch.int64),
            attention_mask=torch.ones(shape, dtype=torch.bool),
            loss_mask=torch.zeros(shape, dtype=torch.bool),
            aux_hidden_states=torch.zeros(*shape, COUNT * self._target_hidden),
            last_hidden_state=torch.zeros(*shape, self._target_hidden),
        )

    def trainable_positions(self, batch: Batch) -> int:
        """Return the live positions of test step 0."""
        assert isinstance(batch, Eagle3Batch)
        return int(count_valid_positions(batch, self._loss.mask_mode))

    def normalisers(self, batch: Batch | None) -> dict[str, float]:
        """Return N: live positions; in ``compat`` normalisation micro-batches, each of which divides by its own."""
        if self._loss.normalisation == "compat":
            return {"micro_batches": 1.0}
        return {"positions": 0.0 if batch is None else float(self.trainable_positions(batch))}
