"""What the reference channel costs, beside a plain implementation.

    python -m tests.benchmarks.bench_channel [--dir DIRECTORY] [--refs 200000] [--redis]

Prints publishing rates, the cost of reading a backlog by halves, memory held while reading it, and wake-up latency.
Rates are per second of wall clock; reading is given per second of CPU as well, which other work on the machine does
not disturb.
"""

from __future__ import annotations

import argparse
import gc
import shutil
import statistics
import tempfile
import threading
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

from disagg_core.channel import StreamingRefChannel
from tests.benchmarks.baselines.plain_channel import PlainChannel
from tests.integration.channel.conftest import redis_server
from tests.unit.channel.kit import make_refs

BATCH = 64
POLL = 64
WINDOW = 256


def row(what: str, figure: str, beside: str = "", wanted: str = "") -> None:
    print(f"{what:<58} {figure:>16} {beside:>26} {wanted:>20}")


def timed(action: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    began = clock()
    action()
    return clock() - began


def bench_publish(directory: Path) -> None:
    """Batches of 64 beside one by one, in turns, so that both meet the same disk."""
    plain = PlainChannel(directory / "plain.jsonl")
    rates: dict[str, list[float]] = {"plain": [], "one": [], "batch": []}
    with StreamingRefChannel(directory / "publish") as channel:
        channel.claim_writer()
        ordinal = 0
        for _ in range(60):  # in small turns: a busy neighbour then slows all three alike
            refs = make_refs(ordinal, ordinal + 24 * BATCH)
            few = refs[:24]
            rates["plain"].append(len(few) / timed(lambda few=few: [plain.publish(ref) for ref in few]))
            rates["one"].append(len(few) / timed(lambda few=few: [channel.publish(ref) for ref in few]))
            batches = [refs[start : start + BATCH] for start in range(0, len(refs), BATCH)]
            rates["batch"].append(len(refs) / timed(lambda batches=batches: [channel.publish_many(b) for b in batches]))
            ordinal += len(refs)
    middle = {name: statistics.median(found) for name, found in rates.items()}
    row("publish, plain, one by one", f"{middle['plain']:,.0f} refs/s")
    row("publish, one by one", f"{middle['one']:,.0f} refs/s", f"{middle['one'] / middle['plain']:.1f} x plain")
    row(
        f"publish, batches of {BATCH}",
        f"{middle['batch']:,.0f} refs/s",
        f"{middle['batch'] / middle['plain']:.1f} x plain",
        ">= 20 x",
    )


def read_half(channel: StreamingRefChannel, count: int) -> None:
    """Read and acknowledge as a consumer does: polls of 64, a cursor for each window of 256."""
    window = []
    while count:
        refs = channel.poll(min(POLL, count))
        count -= len(refs)
        window += refs
        if len(window) >= WINDOW or not count:
            channel.ack(window)
            window = []


def fill(url: str | Path, count: int) -> None:
    with StreamingRefChannel(url) as channel:
        for start in range(0, count, 5000):
            channel.publish_many(make_refs(start, start + 5000))


def bench_backlog(url: str | Path, count: int, wanted: bool) -> None:
    half = count // 2
    walls, cpus = [], []
    with StreamingRefChannel(url) as channel:
        for _ in range(2):
            cpu = time.process_time()
            walls.append(timed(lambda: read_half(channel, half)))
            cpus.append(time.process_time() - cpu)
    row(
        f"read {count:,} with an ack per {WINDOW}",
        f"{count / sum(walls):,.0f} refs/s",
        f"{count / sum(cpus):,.0f} refs/CPU-s",
    )
    row(
        "  second half / first half",
        f"{walls[1] / walls[0]:.2f}",
        f"CPU {cpus[1] / cpus[0]:.2f}",
        "<= 1.3" if wanted else "",
    )


def bench_read_only(directory: Path, count: int) -> None:
    """Decoding alone: poll to the end in small pieces, nothing acknowledged, on one core."""
    with StreamingRefChannel(directory) as channel:
        channel.claim_reader()
        gc.collect()
        cpu, wall, seen = time.process_time(), time.perf_counter(), 0
        halves: list[float] = []
        while refs := channel.poll(POLL):
            seen += len(refs)
            if len(halves) < 2 * seen // count:
                halves.append(time.process_time() - cpu)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    assert seen == count
    row(
        f"poll {count:,} in pieces of {POLL}, decoded to SampleRef",
        f"{seen / wall:,.0f} refs/s",
        f"{seen / cpu:,.0f} refs/CPU-s",
        ">= 100,000",
    )
    row("  second half / first half", "", f"CPU {(cpu - halves[0]) / halves[0]:.2f}", "<= 1.3")


def bench_plain_read(directory: Path, count: int) -> None:
    plain = PlainChannel(directory / "plain-read.jsonl")
    with StreamingRefChannel(directory / "source") as channel:
        channel.publish_many(make_refs(count))
    shutil.copy(directory / "source" / "refs.jsonl", plain.path)
    cpu = time.process_time()
    wall = timed(lambda: [None for _ in iter(lambda: plain.poll(POLL), [])])
    row(
        f"poll {count:,} in pieces of {POLL}, plain",
        f"{count / wall:,.0f} refs/s",
        f"{count / (time.process_time() - cpu):,.0f} refs/CPU-s",
    )


def bench_memory(directory: Path) -> None:
    """The most that polling holds, for short and long backlogs: it must not grow with them."""
    for count in (5_000, 50_000):
        where = directory / f"memory-{count}"
        fill(where, count)
        with StreamingRefChannel(where) as channel:
            channel.claim_reader()
            gc.collect()
            tracemalloc.start()
            while refs := channel.poll(POLL):
                channel.ack(refs)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        row(
            f"most memory held while reading a backlog of {count:,}",
            f"{peak / 1024:,.0f} KiB",
            f"asked for {POLL}",
            "does not grow",
        )


def bench_latency(url: str | Path, rounds: int = 50) -> None:
    latencies: list[float] = []
    with StreamingRefChannel(url) as writer, StreamingRefChannel(url) as reader:
        writer.claim_writer()
        reader.poll(1)
        cpu, began = time.process_time(), time.perf_counter()
        for ordinal in range(rounds):
            began_at: list[float] = []

            def publish(ordinal: int = ordinal, began_at: list[float] = began_at) -> None:
                began_at.append(time.perf_counter())
                writer.publish_many(make_refs(ordinal, ordinal + 1))

            timer = threading.Timer(0.05, publish)
            timer.start()
            while not (refs := reader.poll(8)):
                reader.wait(1.0)
            seen = time.perf_counter()
            timer.join()
            latencies.append(seen - began_at[0])
            reader.ack(refs)
        busy = (time.process_time() - cpu) / (time.perf_counter() - began)
    latencies.sort()
    row(
        "from publish() to poll(), median / worst",
        f"{latencies[rounds // 2] * 1e3:.1f} / {latencies[-1] * 1e3:.1f} ms",
        f"{busy:.0%} of a core",
        "< 50 ms",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, help="where to write; by default the temporary directory")
    parser.add_argument("--refs", type=int, default=200_000)
    parser.add_argument("--redis", action="store_true", help="the Redis backend too, on a server of its own")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.dir) as name:
        directory = Path(name)
        row("what", "figure", "beside it", "wanted")
        bench_publish(directory)
        fill(directory / "backlog", given.refs)
        bench_read_only(directory / "backlog", given.refs)
        bench_backlog(directory / "backlog", given.refs, wanted=True)
        bench_plain_read(directory, 50_000)
        bench_memory(directory)
        bench_latency(directory / "latency")
        if given.redis:
            with redis_server(directory) as port:
                print("redis:")
                fill(f"redis://127.0.0.1:{port}/0?channel=backlog", given.refs // 4)
                bench_backlog(f"redis://127.0.0.1:{port}/0?channel=backlog", given.refs // 4, wanted=False)
                bench_latency(f"redis://127.0.0.1:{port}/0?channel=latency")


if __name__ == "__main__":
    main()
