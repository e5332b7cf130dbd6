"""Samples go in and come out, bit for bit, through a real Mooncake."""

import gc
from collections.abc import Callable

import msgspec
import pytest
import torch

from disagg_core.contracts import RunIdentity, SampleRef, assert_no_tensors
from disagg_core.errors import BadInput, SampleLost, StoreMisuse
from disagg_core.store import MooncakeFeatureStore, NewSample
from disagg_core.store.packing import DTYPES

pytestmark = pytest.mark.integration


def eagle3_sample(tokens: int, hidden: int = 64, seed: int = 0) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return {
        "input_ids": torch.randint(0, 1000, (tokens,), dtype=torch.int32, generator=rng),
        "loss_mask": torch.randint(0, 2, (tokens,), dtype=torch.uint8, generator=rng),
        "aux_hidden_states": torch.randn(tokens, 3 * hidden, generator=rng).bfloat16(),
        "last_hidden_state": torch.randn(tokens, hidden, generator=rng).bfloat16(),
    }


def put(
    store: MooncakeFeatureStore, identity: RunIdentity, tensors: dict[str, torch.Tensor], number: int = 1
) -> SampleRef:
    name = f"s{number:09d}"
    return store.put(name, tensors, identity=identity, source_task_id=name, num_tokens=1, metadata={"number": number})


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_a_sample_is_put_read_by_another_client_and_freed(
    store: MooncakeFeatureStore, open_store: Callable[..., MooncakeFeatureStore], identity: RunIdentity
) -> None:
    sample = eagle3_sample(100)
    ref = put(store, identity, sample)
    assert_no_tensors(ref)
    assert msgspec.json.decode(msgspec.json.encode(ref), type=SampleRef) == ref

    consumer = open_store()
    assert_same(consumer.get(ref), sample)
    assert consumer.key_count() == 1
    consumer.release(ref)
    assert consumer.key_count() == 0
    with pytest.raises(SampleLost, match=r"captured again"):
        consumer.get(ref)


@pytest.mark.parametrize("megabytes", [1, 5, 20, 33], ids=lambda n: f"{n}MB")
def test_large_samples_arrive_whole(store: MooncakeFeatureStore, identity: RunIdentity, megabytes: int) -> None:
    sample = {"aux_hidden_states": torch.randint(0, 256, (megabytes << 20,), dtype=torch.uint8), "x": torch.ones(3)}
    ref = put(store, identity, sample)
    assert_same(store.get(ref), sample)
    store.release(ref)
    assert store.key_count() == 0


def test_every_dtype_and_shape_goes_through(store: MooncakeFeatureStore, identity: RunIdentity) -> None:
    sample = {name: torch.arange(24).view(2, 12).to(dtype) for name, dtype in DTYPES.items() if "e8m0" not in name}
    sample |= {"none": torch.empty(0, 7), "scalar": torch.tensor(3.5), "transposed": torch.randn(6, 4).t().contiguous()}
    ref = put(store, identity, sample | {"transposed": sample["transposed"].t().contiguous().t()})
    assert_same(store.get(ref), sample)
    store.release(ref)


def test_a_sample_of_nothing_but_empty_tensors_is_a_sample(store: MooncakeFeatureStore, identity: RunIdentity) -> None:
    ref = put(store, identity, {"none": torch.empty(0, 3)})
    assert store.get(ref)["none"].shape == (0, 3)
    store.release(ref)


def test_tensors_handed_out_stay_what_they_are_while_others_come_and_go(
    store: MooncakeFeatureStore, identity: RunIdentity
) -> None:
    held = []
    for number in range(30):  # far more than the staging memory
        sample = {"x": torch.full((1 << 20,), number, dtype=torch.uint8), "y": torch.full((5,), number)}
        ref = put(store, identity, sample, number)
        held.append(store.get(ref))
        store.release(ref)
        if number % 3 == 0:
            del held[0]["x"]
            held.pop(0)
    for tensors in held:
        number = int(tensors["y"][0])
        assert bool((tensors["x"] == number).all())
        tensors["x"].add_(1)  # they are the caller's own
    view = held[-1]["x"][100:200]
    held.clear()
    gc.collect()
    for number in range(20):
        ref = put(store, identity, {"x": torch.zeros(1 << 20, dtype=torch.uint8)}, number)
        store.get(ref)
        store.release(ref)
    assert view.unique().numel() == 1
    assert int(view[0]) > 0


def test_many_small_samples_go_in_batches(store: MooncakeFeatureStore, identity: RunIdentity) -> None:
    samples = [eagle3_sample(1 + number, seed=number) for number in range(150)]
    new = [NewSample(f"s{number:09d}", tensors, "task", 1) for number, tensors in enumerate(samples)]
    refs = store.put_many(new, identity=identity)
    assert [ref.sample_id for ref in refs] == [sample.sample_id for sample in new]
    for found, expected in zip(store.get_many(refs), samples, strict=True):
        assert_same(found, expected)
    store.release_many(refs)
    assert store.key_count() == 0


def test_puts_and_gets_run_beside_the_caller(store: MooncakeFeatureStore, identity: RunIdentity) -> None:
    samples = [eagle3_sample(200, seed=number) for number in range(20)]
    puts = [
        store.submit_put(f"s{number:09d}", tensors, identity=identity, source_task_id="t", num_tokens=200)
        for number, tensors in enumerate(samples)
    ]
    refs = [future.result(60) for future in puts]
    gets = [store.submit_get(ref) for ref in refs]
    for future, expected in zip(gets, samples, strict=True):
        assert_same(future.result(60), expected)
    for ref in refs:
        store.abort(ref)
    assert store.key_count() == 0


def test_without_checksums_bytes_are_the_same(
    open_store: Callable[..., MooncakeFeatureStore], identity: RunIdentity
) -> None:
    unchecked = open_store(checksum=False)
    sample = eagle3_sample(50)
    ref = put(unchecked, identity, sample)
    assert ref.crc32 is None
    assert_same(unchecked.get(ref), sample)
    unchecked.release(ref)


def test_a_sweep_takes_its_namespace_and_nothing_else(
    open_store: Callable[..., MooncakeFeatureStore], identity: RunIdentity, run_id: str
) -> None:
    first, tenth = open_store(), open_store(namespace=f"{run_id}/10")
    for number in range(3):
        put(first, identity, eagle3_sample(3), number)
    other = put(tenth, msgspec.structs.replace(identity, attempt=10), eagle3_sample(3))
    assert first.key_count(run_id) == 4
    assert first.sweep() == 3
    assert first.sweep() == 0
    assert tenth.key_count() == 1
    assert tenth.get(other)
    assert first.sweep(run_id) == 1


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"run_id": "elsewhere"}, StoreMisuse),
        ({"attempt": 2}, StoreMisuse),
        ({"key": "elsewhere/1/s1/k"}, StoreMisuse),
        ({"schema_version": 99}, BadInput),
        ({"target_model_version": "other"}, BadInput),
        ({"tokenizer_version": "other"}, BadInput),
        ({"vocab_map_version": "other"}, BadInput),
        ({"size_bytes": 1 << 20}, BadInput),
    ],
    ids=lambda change: next(iter(change)) if isinstance(change, dict) else "",
)
def test_a_reference_that_is_not_this_runs_is_refused(
    open_store: Callable[..., MooncakeFeatureStore],
    identity: RunIdentity,
    change: dict[str, object],
    error: type[Exception],
) -> None:
    store = open_store(expected=identity)
    ref = put(store, identity, eagle3_sample(3))
    name, value = next(iter(change.items()))
    with pytest.raises(error, match=str(value)):
        store.get(msgspec.structs.replace(ref, **{name: value}))
    store.release(ref)


def test_an_identity_of_another_attempt_cannot_put(store: MooncakeFeatureStore, identity: RunIdentity) -> None:
    with pytest.raises(StoreMisuse, match="attempt 7"):
        put(store, msgspec.structs.replace(identity, attempt=7), eagle3_sample(3))
