"""What the feature store gives, beside plain copies of the same bytes, and whether training has to wait for it.

The wait is measured with a producer of its own process: first both sides go as fast as they can, which is what the
store gives; then capture and step each take so long, without using the processor, that training needs half of that.
"""

from __future__ import annotations

import multiprocessing
import statistics
import tempfile
import threading
import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from disagg_core.bench.result import Figure, Result
from disagg_core.contracts import Capture, RunIdentity, SampleRef, sample_id_of
from disagg_core.store import MooncakeFeatureStore, managed_store
from disagg_core.store.endpoints import StoreEndpoints

_MIB = 1 << 20
_AHEAD = 4
_WARM_UP = 8
_IDENTITY = RunIdentity(
    run_id="bench",
    attempt=1,
    strategy="bench",
    target_model_version="",
    tokenizer_version="",
    vocab_map_version="",
    draft_weight_version=0,
    capture=Capture((0,), last_hidden_state=False),
    dtype="uint8",
)


def bench_store(*, samples: int = 60, rounds: int = 15, sizes: tuple[int, ...] = (4, 64), streamed: int = 8) -> Result:
    """Measure put, get and removal of samples of `sizes`, and what training waits for `streamed` ones, in MiB."""
    figures = []
    with (
        tempfile.TemporaryDirectory() as logs,
        managed_store((4 * max(sizes) + 32 * streamed) * _MIB, log_dir=Path(logs)) as endpoints,
    ):
        with MooncakeFeatureStore(endpoints, namespace="bench/1", staging_bytes=(max(sizes) + 16) * _MIB) as store:
            figures += [_moved(store, megabytes, rounds) for megabytes in sizes]
        flat_out = _pair(endpoints, streamed * _MIB, samples, 0.0)
        each = flat_out.total_s / flat_out.samples
        paced = _pair(endpoints, streamed * _MIB, samples, 2 * each)
    share = paced.waited_s / paced.total_s
    figures += [
        Figure("both sides as fast as they can", streamed * _MIB / each / 1e6, "MB/s"),
        Figure(
            "waiting for a store that gives twice what training needs",
            100 * share,
            "%",
            share,
            "step",
            "<= 2 %",
            share <= 0.02,
        ),
    ]
    return Result("store", f"Mooncake over TCP on this machine, {samples} samples of {streamed} MiB", figures)


def _moved(store: MooncakeFeatureStore, megabytes: int, rounds: int) -> Figure:
    """Return the rate of put, get and removal of one sample at a time, beside two copies of its bytes in memory."""
    size = megabytes * _MIB
    places = store.allocate({"features": ((size,), torch.uint8)})
    places["features"].random_(0, 256)
    copy = torch.empty(size, dtype=torch.uint8)
    moved, copied = [], []
    for number in range(rounds + 2):
        began = time.perf_counter()
        ref = store.put(sample_id_of(number), places, identity=_IDENTITY, source_task_id="bench", num_tokens=1)
        store.get(ref)
        store.release(ref)
        between = time.perf_counter()
        copy.copy_(places["features"])
        copy.copy_(places["features"])
        if number >= 2:  # the first rounds connect and fault memory in
            moved.append(between - began)
            copied.append(time.perf_counter() - between)
    rate, plain = size / statistics.median(moved), size / statistics.median(copied)
    return Figure(f"put, get and remove, {megabytes} MiB", rate / 1e6, "MB/s", rate / plain, "two copies in memory")


@dataclass(frozen=True)
class _Consumed:
    total_s: float
    waited_s: float
    samples: int


def _pair(endpoints: StoreEndpoints, size: int, samples: int, each_s: float) -> _Consumed:
    """Return what a consumer saw whose producer, like itself, takes `each_s` for every sample."""
    context = multiprocessing.get_context("spawn")
    refs: Queue[SampleRef] = context.Queue()
    producer = context.Process(target=_produce, args=(endpoints, size, samples, each_s, refs))
    producer.start()
    with MooncakeFeatureStore(endpoints, namespace="bench/1") as store:
        consumed = _consume(store, samples, each_s, refs)
        producer.join()
    return consumed


def _produce(endpoints: StoreEndpoints, size: int, samples: int, each_s: float, refs: Queue[SampleRef]) -> None:
    torch.set_num_threads(1)
    capture, under_way = threading.Event(), deque[Future[SampleRef]]()
    tensors: Mapping[str, Tensor] = {"features": torch.randint(0, 256, (size,), dtype=torch.uint8)}
    with MooncakeFeatureStore(endpoints, namespace="bench/1") as store:
        for number in range(samples):
            capture.wait(each_s)
            under_way.append(
                store.submit_put(
                    sample_id_of(number), tensors, identity=_IDENTITY, source_task_id="bench", num_tokens=1
                )
            )
            while under_way and (under_way[0].done() or len(under_way) > _AHEAD):
                refs.put(under_way.popleft().result())
        for future in under_way:
            refs.put(future.result())


def _consume(store: MooncakeFeatureStore, samples: int, each_s: float, refs: Queue[SampleRef]) -> _Consumed:
    step, ahead = threading.Event(), deque[tuple[SampleRef, Future[dict[str, Any]]]]()
    taken, waited_s, began = 0, 0.0, time.perf_counter()
    for number in range(samples):
        while taken < samples and len(ahead) < _AHEAD + 1:
            ref = refs.get()
            taken += 1
            ahead.append((ref, store.submit_get(ref)))
        if number == _WARM_UP:
            began, waited_s = time.perf_counter(), 0.0
        ref, future = ahead.popleft()
        asked = time.perf_counter()
        future.result()
        waited_s += time.perf_counter() - asked
        step.wait(each_s)
        store.release(ref)
    return _Consumed(time.perf_counter() - began, waited_s, samples - _WARM_UP)
