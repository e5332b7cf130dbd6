"""A stream trained from packed rows: the same samples in each step, the same weights, the same accounts."""

from __future__ import annotations

import pytest
import torch

from disagg_core.training.distributed import Ranks
from tests.integration.training.consumer_kit import Attempt, consumer, end, section, store_samples

pytestmark = pytest.mark.integration


@pytest.fixture
def ranks():
    with Ranks.join("cpu") as joined:
        yield joined


def fit(endpoints, root, run_id, ranks, number, **training):
    """Fit ten samples of 8 to 20 tokens, one of which has nothing to train on, and one is lost."""
    with Attempt(endpoints, root, run_id, number) as attempt:
        refs = attempt.publish(range(5), ended=False)
        dull = store_samples(attempt.store, attempt.identity, [5], masked=True)
        attempt.writer.publish_many(dull)
        rest = attempt.publish(range(6, 10), ended=False)
        attempt.store.abort(rest[1])
        end(attempt.writer, refs + dull + rest)
        trainer, loader = consumer(attempt.reader, attempt.store, ranks, training=section(**training))
        outcome = trainer.fit(loader)
        left = attempt.store.key_count()
    return outcome, trainer.trainees[0].weights(), left


@pytest.mark.parametrize("training", [{"packing": True}, {"pack_tokens": 40}, {"pack_tokens": 1}])
def test_packed_rows_train_what_padded_ones_do(endpoints, tmp_path, run_id, ranks, training):
    padded, expected, _ = fit(endpoints, tmp_path, run_id, ranks, 1, packing=False)

    packed, found, left = fit(endpoints, tmp_path, run_id, ranks, 2, **training)

    for name, weight in found.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-5, atol=1e-6)
    for name in ("steps", "samples", "tokens", "quarantined", "lost", "skipped"):
        assert getattr(packed, name) == getattr(padded, name), name
    assert [name for name, _reason in packed.given_up] == [name for name, _reason in padded.given_up]
    assert (packed.samples, packed.lost, left) == (9, 1, 0)
