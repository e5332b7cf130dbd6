"""Batches of captured samples for the training-time test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from disagg_core.drafts.context import Context, distinct, picked
from disagg_core.drafts.eagle3.batch import Eagle3Batch, count_valid_positions, plan_step, step_mask
from disagg_core.drafts.eagle3.options import LossSection
from disagg_core.drafts.eagle_layers import COUNT
from disagg_core.drafts.layout import Layout
from disagg_core.drafts.method import Batch, Batcher, Sample

_DUMMY_TOKENS = 4


class Eagle3Batcher(Batcher):
    """Pads samples on the right, or packs them; nothing is random. `target_hidden` is H_t, `ttt_length` L."""

    def __init__(self, loss: LossSection, target_hidden: int, ttt_length: int) -> None:
        self._loss = loss
        self._target_hidden = target_hidden
        self._ttt_length = ttt_length
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

    def shared(self, batch: Batch, context: Context, *, pin: bool = False) -> Eagle3Batch:
        """Return the part of `batch` of this rank; of what lies beyond it, it has the tokens of later test steps."""
        assert isinstance(batch, Eagle3Batch)
        mask = step_mask(batch.loss_mask, batch.attention_mask, self._loss.mask_mode)
        plan = plan_step(
            mask,
            batch.attention_mask,
            self._ttt_length,
            mask.device,
            every_row=False,
            dense=False,
            layout=batch.layout,
            context=context,
        )
        assert plan.row_flat is not None
        states = distinct(torch.cat((plan.key_flat, plan.row_flat)))
        teachers = distinct(plan.teacher_flat)
        return replace(
            batch,
            input_ids=picked(batch.input_ids, plan.token_flat, pin=pin),
            aux_hidden_states=picked(batch.aux_hidden_states, states, pin=pin),
            last_hidden_state=picked(batch.last_hidden_state, teachers, pin=pin),
            shared=replace(
                plan,
                token_flat=torch.arange(len(plan.token_flat)),
                key_flat=torch.searchsorted(states, plan.key_flat),
                row_flat=torch.searchsorted(states, plan.row_flat),
                teacher_flat=torch.searchsorted(teachers, plan.teacher_flat),
            ),
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
