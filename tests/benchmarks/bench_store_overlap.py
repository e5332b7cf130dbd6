"""How much of its time a consumer waits for the store while capture and training are both busy.

First both roles run as fast as they can: that is the store's throughput. Then capture and training each take a
synthetic time for every sample (waiting, as for a GPU) such that training needs half of that throughput.
``python tests/benchmarks/bench_store_overlap.py [--megabytes 8] [--samples 100]``
"""

import argparse
import multiprocessing
import multiprocessing.queues
import tempfile
import threading
import time
from collections import deque
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from disagg_core.contracts import Capture, RunIdentity
from disagg_core.store import MooncakeFeatureStore, managed_store
from disagg_core.store.endpoints import StoreEndpoints

MIB = 1 << 20
PREFETCH = 4
WARM_UP = 8
IDENTITY = RunIdentity(
    run_id="bench", attempt=1, strategy="eagle3", target_model_version="t", tokenizer_version="k",
    vocab_map_version="v", draft_weight_version=0, capture=Capture((1, 2, 3), True), dtype="bfloat16",
)  # fmt: skip


class Outcome(NamedTuple):
    """What the consumer saw, in seconds."""

    total: float
    waited: float
    samples: int


def produce(
    endpoints: StoreEndpoints, nbytes: int, samples: int, capture_s: float, refs: multiprocessing.queues.Queue
) -> None:
    """Capture for `capture_s` seconds, hand the sample to the store, capture the next meanwhile."""
    torch.set_num_threads(1)
    capture, under_way = threading.Event(), deque()
    tensors = {"aux_hidden_states": torch.randint(0, 256, (nbytes,), dtype=torch.uint8)}
    with MooncakeFeatureStore(endpoints, namespace="bench/1") as store:
        for number in range(samples):
            capture.wait(capture_s)
            under_way.append(
                store.submit_put(f"s{number}", tensors, identity=IDENTITY, source_task_id="t", num_tokens=1)
            )
            while under_way and (under_way[0].done() or len(under_way) > PREFETCH):
                refs.put(under_way.popleft().result())
        for future in under_way:
            refs.put(future.result())


def consume(store: MooncakeFeatureStore, samples: int, step_s: float, refs: multiprocessing.queues.Queue) -> Outcome:
    """Fetch `PREFETCH` samples ahead, train on each for `step_s` seconds, free it."""
    step, ahead, taken, waited, begin = threading.Event(), deque(), 0, 0.0, 0.0
    for number in range(samples):
        while taken < samples and len(ahead) < PREFETCH + 1:
            ref = refs.get()
            taken += 1
            ahead.append((ref, store.submit_get(ref)))
        if number == WARM_UP:
            begin, waited = time.perf_counter(), 0.0
        ref, future = ahead.popleft()
        asked = time.perf_counter()
        future.result()
        waited += time.perf_counter() - asked
        step.wait(step_s)
        store.release(ref)
    return Outcome(time.perf_counter() - begin, waited, samples - WARM_UP)


def run(endpoints: StoreEndpoints, nbytes: int, samples: int, each_s: float) -> Outcome:
    """Both roles, in two processes; `each_s` is the time of one capture and of one step."""
    context = multiprocessing.get_context("spawn")
    refs = context.Queue()
    producer = context.Process(target=produce, args=(endpoints, nbytes, samples, each_s, refs))
    producer.start()
    with MooncakeFeatureStore(endpoints, namespace="bench/1") as store:
        outcome = consume(store, samples, each_s, refs)
        producer.join()
        assert store.sweep() == 0
    return outcome


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--megabytes", type=int, default=8)
    options.add_argument("--samples", type=int, default=100)
    chosen = options.parse_args()
    torch.set_num_threads(1)
    nbytes = chosen.megabytes * MIB
    with tempfile.TemporaryDirectory() as logs, managed_store(512 * MIB, log_dir=Path(logs)) as endpoints:
        flat_out = run(endpoints, nbytes, chosen.samples, 0.0)
        a_sample = flat_out.total / flat_out.samples
        paced = run(endpoints, nbytes, chosen.samples, 2 * a_sample)
    table = Table("run", "ms a sample", "MB/s", "waited for the store", title=f"{chosen.megabytes} MiB samples")
    for name, outcome in (("flat out", flat_out), ("training needs half", paced)):
        each = outcome.total / outcome.samples
        share = f"{100 * outcome.waited / outcome.total:.1f} %"
        table.add_row(name, f"{each * 1e3:.1f}", f"{nbytes / each / 1e6:.0f}", share)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
