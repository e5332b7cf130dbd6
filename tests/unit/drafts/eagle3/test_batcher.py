"""How captured samples become a batch of the training-time test."""

from __future__ import annotations

import pytest
import torch

from disagg_core.drafts.eagle3.batcher import Eagle3Batcher
from disagg_core.drafts.eagle3.options import LossSection
from disagg_core.drafts.method import Sample

pytestmark = pytest.mark.unit


def sample(tokens: int) -> Sample:
    return Sample(
        "s000000000",
        {
            "input_ids": torch.arange(1, tokens + 1, dtype=torch.int32),
            "loss_mask": torch.ones(tokens, dtype=torch.uint8),
            "aux_hidden_states": torch.ones(tokens, 6, dtype=torch.bfloat16),
            "last_hidden_state": torch.ones(tokens, 2, dtype=torch.bfloat16),
        },
    )


def test_samples_are_padded_on_the_right_with_zeros() -> None:
    batch = Eagle3Batcher(LossSection(), 2, 3).collate([sample(3), sample(5)], multiple_of=4)

    assert batch.input_ids.tolist() == [[1, 2, 3, 0, 0, 0, 0, 0], [1, 2, 3, 4, 5, 0, 0, 0]]
    assert batch.attention_mask.sum(1).tolist() == [3, 5]
    assert batch.loss_mask.sum(1).tolist() == [3, 5]
    assert batch.aux_hidden_states.shape == (2, 8, 6)
    assert batch.aux_hidden_states.dtype == torch.bfloat16
    assert float(batch.last_hidden_state.float().sum()) == 16.0


def test_in_compat_normalisation_every_micro_batch_divides_by_its_own() -> None:
    batcher = Eagle3Batcher(LossSection(normalisation="compat", mask_mode="compat"), 2, 3)

    assert not batcher.by_length
    assert batcher.normalisers(None) == batcher.normalisers(batcher.collate([sample(3)])) == {"micro_batches": 1.0}
