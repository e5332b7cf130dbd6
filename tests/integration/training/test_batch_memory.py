"""Where the batches of a window lie: in the store's memory while there is room, and nobody writes over them."""

from __future__ import annotations

import pytest
import torch

from disagg_core.contracts import sample_id_of
from disagg_core.store import MooncakeFeatureStore
from disagg_core.training.distributed import Ranks
from tests.integration.training.consumer_kit import TARGET_HIDDEN, VOCAB, Attempt, consumer, end, section

pytestmark = pytest.mark.integration

MIB = 1 << 20
TOKENS = 4096  # 1 MiB of states


def states(ordinal: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(ordinal)
    return {
        "input_ids": torch.randint(0, VOCAB, (TOKENS,), generator=generator, dtype=torch.int32),
        "loss_mask": torch.ones(TOKENS, dtype=torch.uint8),
        "aux_hidden_states": torch.randn(TOKENS, 3 * TARGET_HIDDEN, generator=generator),
        "last_hidden_state": torch.randn(TOKENS, TARGET_HIDDEN, generator=generator),
    }


def lies_in(store: MooncakeFeatureStore, tensor: torch.Tensor) -> bool:
    return any(r.address <= tensor.data_ptr() < r.address + len(r.memory) for r in store._lent._regions)


@pytest.fixture
def attempt(endpoints, tmp_path, run_id):
    with Attempt(endpoints, tmp_path, run_id) as opened:
        yield opened


def published(attempt: Attempt, count: int) -> None:
    refs = []
    for ordinal in range(count):
        name = sample_id_of(ordinal)
        refs.append(
            attempt.store.put(name, states(ordinal), identity=attempt.identity, source_task_id=name, num_tokens=TOKENS)
        )
    attempt.writer.publish_many(refs)
    end(attempt.writer, refs)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_batches_that_are_held_stay_as_they_are_while_all_others_come_and_go(attempt, batch_size) -> None:
    published(attempt, 12)
    one_sample = section(batch_size=batch_size, accumulation_steps=1)
    with (
        MooncakeFeatureStore(attempt.endpoints, namespace=attempt.store.namespace, staging_bytes=4 * MIB) as store,
        Ranks.join("cpu") as ranks,
    ):
        _, loader = consumer(attempt.reader, store, ranks, training=one_sample)
        held = []
        for number, window in enumerate(loader):
            loader.complete(window, step=number + 1)
            if number % 2 == 0:
                held.append((window.refs, window.drafts[0].batches[0]))
            del window
        loader.finish("end of stream")

        assert attempt.store.key_count() == 0
        for refs, batch in held:
            expected = [states(int(ref.sample_id[1:])) for ref in refs]
            found = batch.aux_hidden_states.reshape(len(refs), TOKENS, -1)
            assert torch.equal(found, torch.stack([one["aux_hidden_states"] for one in expected]))
            last = batch.last_hidden_state.reshape(len(refs), TOKENS, -1)
            assert torch.equal(last, torch.stack([one["last_hidden_state"] for one in expected]))
        in_store = [lies_in(store, batch.aux_hidden_states) for _, batch in held]
        assert any(in_store) == (batch_size == 1)
        assert not all(in_store)  # a pool that is held does not make the others wait

        held.clear()
        del found, last, batch, expected
        assert store._lent.acquire_now(4 * MIB) is not None
