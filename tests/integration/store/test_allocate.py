"""A producer that captures into the store's own memory is spared a copy, and nothing else changes for anyone."""

import gc
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from disagg_core.contracts import RunIdentity
from disagg_core.errors import BadInput, StoreMisuse
from disagg_core.store import MooncakeFeatureStore, NewSample
from tests.integration.store.test_put_get import assert_same, eagle3_sample, put

pytestmark = pytest.mark.integration

Open = Callable[..., MooncakeFeatureStore]
Sample = Mapping[str, torch.Tensor]


def filled(store: MooncakeFeatureStore, sample: Sample) -> Sample:
    """`sample` in memory that the store has allocated."""
    places = store.allocate({name: (tuple(tensor.shape), tensor.dtype) for name, tensor in sample.items()})
    for name, tensor in sample.items():
        places[name].copy_(tensor)
    return places


def test_it_is_sent_from_where_it_lies_and_equals_a_copied_one(
    open_store: Open, identity: RunIdentity, faults: Any
) -> None:
    store = open_store(wrap=faults.wrap)
    sample = eagle3_sample(333)
    placed = filled(store, sample)
    ref, copied = put(store, identity, placed), put(store, identity, sample)
    sources = [args[1] for method, args in faults.calls if method == "put_from"]
    assert sources[0] == placed["input_ids"].data_ptr()
    assert sources[1] != sources[0]
    assert (ref.crc32, ref.size_bytes, ref.feature_specs) == (copied.crc32, copied.size_bytes, copied.feature_specs)
    assert_same(store.get(ref), sample)
    store.release_many([ref, copied])


def test_allocated_and_other_samples_share_a_batch(open_store: Open, identity: RunIdentity, faults: Any) -> None:
    store = open_store(wrap=faults.wrap)
    samples = [eagle3_sample(10 + number, seed=number) for number in range(9)]
    placed = [filled(store, sample) if number % 2 else sample for number, sample in enumerate(samples)]
    new = [NewSample(f"s{number:09d}", tensors, "task", 1) for number, tensors in enumerate(placed)]
    faults.on("batch_put_from", lambda real, *args: [-900, -900, *real(*args)[2:]])  # one of each kind is put again
    refs = store.put_many(new, identity=identity)
    for found, expected in zip(store.get_many(refs), samples, strict=True):
        assert_same(found, expected)
    store.release_many(refs)
    store.gc()


def test_what_does_not_lie_as_it_will_be_stored_is_copied(store: MooncakeFeatureStore, identity: RunIdentity) -> None:
    placed = filled(store, eagle3_sample(100))
    turned = {"last_hidden_state": placed["last_hidden_state"].t()}
    backwards = dict(reversed(list(placed.items())))
    middle = {name: tensor[20:40] for name, tensor in placed.items()}
    part = {"aux_hidden_states": placed["aux_hidden_states"][3:5]}
    empty = {"nothing": placed["input_ids"][:0]}
    for number, sample in enumerate((turned, backwards, middle, part, empty)):
        ref = put(store, identity, sample, number)
        assert_same(store.get(ref), sample)
        store.release(ref)


def test_without_room_the_memory_is_ordinary_and_comes_back_with_the_last_tensor(
    open_store: Open, identity: RunIdentity, faults: Any
) -> None:
    store = open_store(wrap=faults.wrap, staging_bytes=2 << 20)
    large = {"x": torch.randint(0, 256, (1_500_000,), dtype=torch.uint8)}
    first, second = filled(store, large), filled(store, large)
    refs = [put(store, identity, sample) for sample in (first, second)]
    address = first["x"].data_ptr()
    part = first["x"][5:9]
    del first
    gc.collect()
    assert store.allocate({"x": ((1_500_000,), torch.uint8)})["x"].data_ptr() != address
    del part
    gc.collect()
    assert store.allocate({"x": ((1_500_000,), torch.uint8)})["x"].data_ptr() == address
    for ref in refs:
        assert_same(store.get(ref), large)
        store.release(ref)


def test_a_sample_larger_than_the_memory_is_put_all_the_same(open_store: Open, identity: RunIdentity) -> None:
    store = open_store(staging_bytes=2 << 20)
    large = {"x": torch.randint(0, 256, (5 << 20,), dtype=torch.uint8)}
    ref = put(store, identity, filled(store, large))
    assert_same(store.get(ref), large)
    store.release(ref)


def test_a_dtype_that_cannot_be_stored_is_refused_at_once(store: MooncakeFeatureStore) -> None:
    with pytest.raises(BadInput, match=r"'x': expected one of .* found complex64"):
        store.allocate({"x": ((3,), torch.complex64)})


def test_nothing_is_allocated_after_close(open_store: Open) -> None:
    store = open_store()
    kept = store.allocate({"x": ((4096,), torch.uint8)})["x"].fill_(7)
    store.close()
    with pytest.raises(StoreMisuse, match="after close"):
        store.allocate({"x": ((1,), torch.uint8)})
    assert kept.unique().tolist() == [7]
