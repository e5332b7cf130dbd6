"""Samples go from a GPU into the store and back, through page-locked memory and streams of their own."""

import threading

import pytest
import torch

from disagg_core.contracts import RunIdentity
from disagg_core.store import MooncakeFeatureStore

pytestmark = [
    pytest.mark.integration,
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_gpu_tensors_come_back_on_the_gpu(store: MooncakeFeatureStore, identity: RunIdentity) -> None:
    for megabytes in (1, 30):
        hidden = torch.randn(megabytes << 18, device="cuda")
        sample = {"aux_hidden_states": hidden.view(-1, 64).t(), "input_ids": torch.arange(10)}
        ref = store.put("s1", sample, identity=identity, source_task_id="t", num_tokens=10)
        found = store.get(ref, device="cuda")
        assert all(tensor.is_cuda for tensor in found.values())
        assert torch.equal(found["aux_hidden_states"], sample["aux_hidden_states"])
        assert torch.equal(store.get(ref)["aux_hidden_states"], sample["aux_hidden_states"].cpu())
        store.release(ref)
    assert store._in.is_pinned


def test_allocated_memory_is_page_locked_and_takes_copies_from_the_gpu(
    store: MooncakeFeatureStore, identity: RunIdentity
) -> None:
    hidden = torch.randn(1 << 20, device="cuda")
    places = store.allocate({"x": ((1 << 20,), torch.float32)}, hidden.device)
    places["x"].copy_(hidden, non_blocking=True)
    torch.cuda.synchronize()
    ref = store.put("s1", places, identity=identity, source_task_id="t", num_tokens=1)
    assert places["x"].is_pinned()
    assert torch.equal(store.get(ref, device="cuda")["x"], hidden)
    store.release(ref)


def test_a_put_waits_for_the_kernels_that_write_the_sample(store: MooncakeFeatureStore, identity: RunIdentity) -> None:
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        late = torch.zeros(1 << 20, device="cuda")
        torch.cuda._sleep(200_000_000)
        late += 1
        future = store.submit_put("s1", {"x": late}, identity=identity, source_task_id="t", num_tokens=1)
    ref = future.result(30)
    assert bool((store.get(ref)["x"] == 1).all())
    store.release(ref)


def test_gets_run_beside_the_models_kernels(store: MooncakeFeatureStore, identity: RunIdentity) -> None:
    refs = [
        store.put(f"s{n}", {"x": torch.full((1 << 18,), n)}, identity=identity, source_task_id="t", num_tokens=1)
        for n in range(20)
    ]
    futures = [store.submit_get(ref, device="cuda") for ref in refs]
    total = torch.zeros((), dtype=torch.int64, device="cuda")
    for n, future in enumerate(futures):
        total += future.result(30)["x"].sum() - n * (1 << 18)
    assert int(total) == 0
    assert threading.active_count() < 100
    for ref in refs:
        store.release(ref)
