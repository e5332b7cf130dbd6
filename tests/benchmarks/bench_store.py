"""The store beside raw Mooncake calls on memory of the same kind, in the same run.

Rates of put + get + remove. "raw" is ``put_from``, ``get_into`` and ``remove`` of one registered, faulted-in buffer;
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

from disagg_core.contracts import RunIdentity
from disagg_core.plan import StoreEndpoints
from disagg_core.store import MooncakeFeatureStore, NewSample, managed_store
from disagg_core.store.session import Session
from disagg_core.store.staging import StagingPool

MIB = 1 << 20
Sample = Mapping[str, torch.Tensor]
IDENTITY = RunIdentity(
    run_id="bench", attempt=1, strategy="eagle3", target_model_version="t", tokenizer_version="k",
    vocab_map_version="v", draft_weight_version=0, aux_layers=(1, 2, 3), dtype="bfloat16",
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
    """Mooncake's own calls."""

    def __init__(self, endpoints: StoreEndpoints) -> None:
        self.session = Session(
            endpoints, host="127.0.0.1", protocol="tcp", connect_timeout_s=5, wrap=lambda client: client
        )
        with self.session.raw() as client:
            self.client = client
        pool = StagingPool(160 * MIB, self.client.register_buffer, "raw")
        self.source, self.target = pool.acquire(72 * MIB, 1), pool.acquire(72 * MIB, 1)
        self.source.buffer.random_(0, 256)

    def parts(self, nbytes: int) -> tuple[float, float, float]:
        """Seconds of one put, one get, one removal."""
        key, begin = uuid.uuid4().hex, time.perf_counter()
        assert self.client.put_from(key, self.source.address, nbytes, self.session.hard_pin) == 0
        put = time.perf_counter()
        assert self.client.get_into(key, self.target.address, nbytes) == nbytes
        got = time.perf_counter()
        assert self.client.remove(key, True) == 0
        return put - begin, got - put, time.perf_counter() - got

    def naive(self, tensors: dict[str, torch.Tensor]) -> None:
        """One object for each tensor, with fresh registered memory for each get."""
        stem = uuid.uuid4().hex
        for name, tensor in tensors.items():
            nbytes = tensor.numel() * tensor.element_size()
            assert self.client.register_buffer(tensor.data_ptr(), nbytes) == 0
            assert self.client.put_from(f"{stem}/{name}", tensor.data_ptr(), nbytes, self.session.hard_pin) == 0
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


def throughput(raw: Raw, checked: MooncakeFeatureStore, unchecked: MooncakeFeatureStore, rounds: int) -> Table:
    """Large samples: the share of raw throughput, with and without checksums, and when a put has to copy first."""
    columns = ("raw MB/s", "checksums on", "ratio", "off", "ratio", "on, copied first", "ratio")
    table = Table("size", *columns, title="put + get + remove")
    for megabytes in (4, 64):
        tensors = sample_of(megabytes * MIB)
        nbytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        ways = {
            "raw": partial(raw.parts, nbytes),
            "on": partial(ours_parts, checked, in_transfer_memory(checked, tensors)),
            "off": partial(ours_parts, unchecked, in_transfer_memory(unchecked, tensors)),
            "copied": partial(ours_parts, checked, tensors),
        }
        took = in_turns(ways, rounds * (4 if megabytes == 4 else 1))
        rate = {name: nbytes / seconds / 1e6 for name, seconds in took.items()}
        on, off, copied = (took["raw"] / took[name] for name in ("on", "off", "copied"))
        table.add_row(
            f"{megabytes} MiB", f"{rate['raw']:.0f}", f"{rate['on']:.0f}", f"{on:.2f} (>= 0.85)", f"{rate['off']:.0f}",
            f"{off:.2f} (>= 0.95)", f"{rate['copied']:.0f}", f"{copied:.2f}",
        )  # fmt: skip
    return table


def small(raw: Raw, store: MooncakeFeatureStore, rounds: int) -> Table:
    """128 KB samples in batches beside the naive way."""
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


def latency(raw: Raw, store: MooncakeFeatureStore, rounds: int) -> Table:
    """Put, get and remove at 4 KB."""
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
    with tempfile.TemporaryDirectory() as logs, managed_store(512 * MIB, log_dir=Path(logs)) as endpoints:
        raw = Raw(endpoints)
        with (
            MooncakeFeatureStore(endpoints, namespace="bench/1", staging_bytes=80 * MIB) as checked,
            MooncakeFeatureStore(endpoints, namespace="bench/1", staging_bytes=80 * MIB, checksum=False) as unchecked,
        ):
            console.print(throughput(raw, checked, unchecked, rounds))
            console.print(small(raw, checked, rounds))
            console.print(latency(raw, checked, rounds))
        raw.session.close()


if __name__ == "__main__":
    main()
