"""The store beside raw Mooncake calls on the same buffers, in the same run.

Rates of put + get + remove. "raw" is ``put_from``, ``get_into`` and ``remove`` of registered, faulted-in memory;
"naive" is one object for each tensor, registered and unregistered on each call, with ``is_exist`` before the get. The
ways take turns, so that a busy machine is as busy for all of them; figures are medians.
``python tests/benchmarks/bench_store.py [--rounds 20]``
"""

import argparse
import random
import statistics
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from disagg_core.contracts import Capture, RunIdentity
from disagg_core.store import MooncakeFeatureStore, NewSample, managed_store
from disagg_core.store.outgoing import layout_of

MIB = 1 << 20
Sample = Mapping[str, torch.Tensor]
IDENTITY = RunIdentity(
    run_id="bench", attempt=1, strategy="eagle3", target_model_version="t", tokenizer_version="k",
    vocab_map_version="v", draft_weight_version=0, capture=Capture((1, 2, 3), True), dtype="bfloat16",
)  # fmt: skip


def sample_of(nbytes: int) -> dict[str, torch.Tensor]:
    """An EAGLE-3 sample of about `nbytes`: three parts aux states, one part last hidden state, a little of the rest."""
    hidden = 64 if nbytes < MIB else 1024
    tokens = max(1, nbytes // (4 * hidden * 2 + 5))
    return {
        "input_ids": torch.randint(0, 1000, (tokens,), dtype=torch.int32),
        "loss_mask": torch.ones(tokens, dtype=torch.uint8),
        "aux_hidden_states": torch.randn(tokens, 3 * hidden).bfloat16(),
        "last_hidden_state": torch.randn(tokens, hidden).bfloat16(),
    }


class Raw:
    """Mooncake's own calls, by the client of `store` and on its transfer memory.

    `source` and `target` are addresses in it: where a sample lies that was captured in place, and where a get puts it.
    """

    def __init__(self, store: MooncakeFeatureStore, source: int, target: int) -> None:
        self.client, self.hard_pin = store._session.client, store._session.hard_pin
        self.source, self.target = source, target

    @classmethod
    def on_buffers_of(cls, store: MooncakeFeatureStore, placed: Sample) -> "Raw":
        """Use the very memory that a put of `placed` and a get of it use."""
        ref = store.put("s1", placed, identity=IDENTITY, source_task_id="t", num_tokens=1)
        found = store.get(ref)
        store.release(ref)
        return cls(store, next(iter(placed.values())).data_ptr(), next(iter(found.values())).data_ptr())

    def parts(self, nbytes: int) -> tuple[float, float, float]:
        """Seconds of one put, one get, one removal."""
        key, begin = uuid.uuid4().hex, time.perf_counter()
        assert self.client.put_from(key, self.source, nbytes, self.hard_pin) == 0
        put = time.perf_counter()
        assert self.client.get_into(key, self.target, nbytes) == nbytes
        got = time.perf_counter()
        assert self.client.remove(key, True) == 0
        return put - begin, got - put, time.perf_counter() - got

    def naive(self, tensors: dict[str, torch.Tensor]) -> None:
        """One object for each tensor, with fresh registered memory for each get."""
        stem = uuid.uuid4().hex
        for name, tensor in tensors.items():
            nbytes = tensor.numel() * tensor.element_size()
            assert self.client.register_buffer(tensor.data_ptr(), nbytes) == 0
            assert self.client.put_from(f"{stem}/{name}", tensor.data_ptr(), nbytes, self.hard_pin) == 0
            assert self.client.unregister_buffer(tensor.data_ptr()) == 0
        for name, tensor in tensors.items():
            target = torch.empty_like(tensor)
            nbytes = target.numel() * target.element_size()
            assert self.client.is_exist(f"{stem}/{name}") == 1
            assert self.client.register_buffer(target.data_ptr(), nbytes) == 0
            assert self.client.get_into(f"{stem}/{name}", target.data_ptr(), nbytes) == nbytes
            assert self.client.unregister_buffer(target.data_ptr()) == 0
        for name in tensors:
            assert self.client.remove(f"{stem}/{name}", True) == 0


def in_transfer_memory(store: MooncakeFeatureStore, tensors: Sample) -> Sample:
    """The same sample as a producer leaves it that captures into what `store.allocate` gave."""
    places = store.allocate({name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()})
    for name, tensor in tensors.items():
        places[name].copy_(tensor)
    return places


def ours_parts(store: MooncakeFeatureStore, tensors: Sample) -> tuple[float, float, float]:
    """Seconds of one put, one get, one release."""
    begin = time.perf_counter()
    ref = store.put("s1", tensors, identity=IDENTITY, source_task_id="t", num_tokens=1)
    put = time.perf_counter()
    found = store.get(ref)
    got = time.perf_counter()
    store.release(ref)
    done = time.perf_counter()
    assert len(found) == len(tensors)
    return put - begin, got - put, done - got


def in_turns(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Run all ways `rounds` times, each time in another order; return the median seconds of each."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    order = random.Random(0)
    for number in range(rounds + 2):
        for name, way in order.sample(list(ways.items()), len(ways)):
            begin = time.perf_counter()
            way()
            if number >= 2:  # the first rounds fault in and connect
                times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in times.items()}


def throughput(checked: MooncakeFeatureStore, unchecked: MooncakeFeatureStore, rounds: int) -> Table:
    """Large samples: the share of raw throughput, with and without checksums, and when a put has to copy first."""
    columns = ("checksums", "raw MB/s", "store MB/s", "of raw", "copied first, of raw")
    table = Table("size", *columns, title="put + get + remove on the same buffers")
    for megabytes in (4, 64):
        tensors = sample_of(megabytes * MIB)
        for name, store, goal in (("on", checked, 0.85), ("off", unchecked, 0.95)):
            placed = in_transfer_memory(store, tensors)
            nbytes = layout_of(placed).size_bytes
            ways = {
                "raw": partial(Raw.on_buffers_of(store, placed).parts, nbytes),
                "store": partial(ours_parts, store, placed),
                "copied": partial(ours_parts, store, tensors),
            }
            took = in_turns(ways, rounds * (4 if megabytes == 4 else 1))
            rates = [f"{nbytes / took[way] / 1e6:.0f}" for way in ("raw", "store")]
            shares = f"{took['raw'] / took['store']:.2f} (>= {goal})", f"{took['raw'] / took['copied']:.2f}"
            table.add_row(f"{megabytes} MiB", name, *rates, *shares)
    return table


def small(store: MooncakeFeatureStore, rounds: int) -> Table:
    """128 KB samples in batches beside the naive way."""
    raw = Raw(store, 0, 0)
    batch = [sample_of(128 << 10) for _ in range(64)]
    new = [NewSample(f"s{number}", tensors, "t", 1) for number, tensors in enumerate(batch)]

    def batched() -> None:
        refs = store.put_many(new, identity=IDENTITY)
        store.get_many(refs)
        store.release_many(refs)

    def one_by_one() -> None:
        for tensors in batch[:16]:
            ours_parts(store, tensors)

    def naive() -> None:
        for tensors in batch[:16]:
            raw.naive(tensors)

    took = in_turns({"naive": naive, "one by one": one_by_one, "batches of 64": batched}, rounds)
    each = {name: seconds / (64 if name == "batches of 64" else 16) for name, seconds in took.items()}
    table = Table("way", "us a sample", "samples/s", "times naive", title="128 KB samples, put + get + remove")
    for name, seconds in each.items():
        goal = " (>= 5)" if name == "batches of 64" else ""
        table.add_row(name, f"{seconds * 1e6:.0f}", f"{1 / seconds:.0f}", f"{each['naive'] / seconds:.1f}{goal}")
    return table


def latency(store: MooncakeFeatureStore, rounds: int) -> Table:
    """Put, get and remove at 4 KB."""
    source, target = (store.allocate({"x": ((4096,), torch.uint8)})["x"] for _ in range(2))
    raw = Raw(store, source.data_ptr(), target.data_ptr())
    tensors = {"x": torch.randint(0, 256, (4096,), dtype=torch.uint8)}
    table = Table("way", "put us", "get us", "remove us", title="latency at 4 KB (median, 99th percentile)")
    ways = {"raw": lambda: raw.parts(4096), "store": lambda: ours_parts(store, tensors)}
    turns = [{name: way() for name, way in ways.items()} for _ in range(rounds * 20)]
    for name in ways:
        columns = list(zip(*[turn[name] for turn in turns], strict=True))
        cells = [f"{statistics.median(c) * 1e6:.0f}  {statistics.quantiles(c, n=100)[98] * 1e6:.0f}" for c in columns]
        table.add_row(name, *cells)
    return table


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=20)
    rounds = options.parse_args().rounds
    torch.set_num_threads(1)
    console = Console(width=120)
    with (
        tempfile.TemporaryDirectory() as logs,
        managed_store(512 * MIB, log_dir=Path(logs)) as endpoints,
        MooncakeFeatureStore(endpoints, namespace="bench/1", staging_bytes=80 * MIB) as checked,
        MooncakeFeatureStore(endpoints, namespace="bench/1", staging_bytes=80 * MIB, checksum=False) as unchecked,
    ):
        console.print(throughput(checked, unchecked, rounds))
        console.print(small(checked, rounds))
        console.print(latency(checked, rounds))


if __name__ == "__main__":
    main()
