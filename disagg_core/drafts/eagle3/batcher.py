"""Batches of captured samples for the training-time test."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from disagg_core.drafts.eagle3.batch import Eagle3Batch, count_valid_positions
from disagg_core.drafts.eagle3.options import LossSection
from disagg_core.drafts.eagle_layers import COUNT
from disagg_core.drafts.layout import Layout
from disagg_core.drafts.method import Batch, Batcher, Sample

_DUMMY_TOKENS = 4


class Eagle3Batcher(Batcher):
    """Pads samples on the right, or packs them; nothing is random. `target_hidden` is H_t."""

    def __init__(self, loss: LossSection, target_hidden: int) -> None:
        self._loss = loss
        self._target_hidden = target_hidden
        self.by_length = loss.normalisation == "valid"

    def collate(
        self, samples: Sequence[Sample], *, multiple_of: int = 1, packed: bool = False, pin: bool = False
    ) -> Eagle3Batch:
        """Return `samples` as one batch; padding is zero everywhere, hidden states keep their dtype."""
        lengths = [len(sample) for sample in samples]
        layout = Layout.of(lengths, multiple_of=multiple_of, packed=packed, pin=pin)
        columns = {name: [sample.tensors[name] for sample in samples] for name in samples[0].tensors}
        return Eagle3Batch(
            input_ids=layout.laid(columns["input_ids"], multiple_of=multiple_of, dtype=torch.int64),
            attention_mask=torch.arange(layout.width)[None, :] < torch.tensor(lengths)[:, None],
            loss_mask=layout.grid(columns["loss_mask"]).bool(),
            aux_hidden_states=layout.laid(columns["aux_hidden_states"], multiple_of=multiple_of),
            last_hidden_state=layout.laid(columns["last_hidden_state"], multiple_of=multiple_of),
            packing=layout if packed else None,
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
