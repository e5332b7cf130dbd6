"""What the reference channel costs, beside a file that is opened, written and synced for each reference."""

from __future__ import annotations

import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec

from disagg_core.bench.result import Figure, Result
from disagg_core.channel import StreamingRefChannel
from disagg_core.contracts import SCHEMA_VERSION, SampleRef, sample_id_of
from disagg_core.run_spec.draft import DEFAULT_METHOD

_BATCH = 64
_WINDOW = 256
_ROUNDS = 20
_PLAIN = 24


def bench_channel(directory: Path | None = None, refs: int = 50_000) -> Result:
    """Measure publishing, reading with acknowledgements, and the time from one end to the other, below `directory`."""
    with tempfile.TemporaryDirectory(dir=directory) as name:
        root = Path(name)
        plain, batched = _published(root)
        read = _read(root / "backlog", refs)
        median, worst = _latency(root / "latency")
    figures = [
        Figure("publish, one by one, plain file", plain, "refs/s"),
        Figure(
            f"publish in batches of {_BATCH}",
            batched,
            "refs/s",
            batched / plain,
            "plain",
            ">= 20",
            batched >= 20 * plain,
        ),
        Figure(f"read, decoded, an ack per {_WINDOW}", read, "refs/CPU-s", read / plain, "plain, published"),
        Figure("from publish to poll, median", 1e3 * median, "ms", wanted="< 50 ms", kept=median < 0.05),
        Figure("from publish to poll, worst", 1e3 * worst, "ms"),
    ]
    return Result("channel", f"files in {directory or tempfile.gettempdir()}, {refs:,} references", figures)


def _published(root: Path) -> tuple[float, float]:
    """Return references a second of the plain file and of batches, measured in turns so that both meet one disk."""
    encoder = msgspec.json.Encoder()

    def plainly(refs: list[SampleRef]) -> None:
        for ref in refs:
            with (root / "plain.jsonl").open("ab") as file:
                file.write(encoder.encode(ref) + b"\n")
                file.flush()
                os.fsync(file.fileno())

    def in_batches(refs: list[SampleRef]) -> None:
        for start in range(0, len(refs), _BATCH):
            channel.publish_many(refs[start : start + _BATCH])

    rates: tuple[list[float], list[float]] = ([], [])
    with StreamingRefChannel(root / "publish") as channel:
        channel.claim_writer()
        for number in range(_ROUNDS):
            refs = _refs(number * 16 * _BATCH, (number + 1) * 16 * _BATCH)
            few = refs[:_PLAIN]
            rates[0].append(len(few) / _seconds(partial(plainly, few)))
            rates[1].append(len(refs) / _seconds(partial(in_batches, refs)))
    return statistics.median(rates[0]), statistics.median(rates[1])


def _read(directory: Path, count: int) -> float:
    """Return references a second of processor time of a consumer that reads a backlog and acknowledges windows."""
    with StreamingRefChannel(directory) as writer:
        for start in range(0, count, 5000):
            writer.publish_many(_refs(start, min(count, start + 5000)))
    with StreamingRefChannel(directory) as reader:
        began, window = time.process_time(), list[SampleRef]()
        for _ in range(0, count, _BATCH):
            window += reader.poll(_BATCH)
            if len(window) >= _WINDOW:
                reader.ack(window)
                window = []
        return count / (time.process_time() - began)


def _latency(directory: Path, rounds: int = 30) -> tuple[float, float]:
    """Return median and worst seconds from a publish to the poll that returns it."""
    found: list[float] = []
    with StreamingRefChannel(directory) as writer, StreamingRefChannel(directory) as reader:
        writer.claim_writer()
        reader.poll(1)
        for ordinal in range(rounds):
            began: list[float] = []

            def publish(ordinal: int = ordinal, began: list[float] = began) -> None:
                began.append(time.perf_counter())
                writer.publish_many(_refs(ordinal, ordinal + 1))

            timer = threading.Timer(0.05, publish)
            timer.start()
            while not (refs := reader.poll(8)):
                reader.wait(1.0)
            found.append(time.perf_counter() - began[0])
            timer.join()
            reader.ack(refs)
    return statistics.median(found), max(found)


def _refs(first: int, end: int) -> list[SampleRef]:
    return [
        SampleRef(
            sample_id=sample_id_of(ordinal),
            run_id="local",
            attempt=1,
            source_task_id=f"prompts.jsonl:{ordinal}",
            feature_store_uri="mooncake://127.0.0.1:50051",
            key=f"local/1/{sample_id_of(ordinal)}/0123456789abcdef0123456789abcdef",
            size_bytes=4_000_000,
            crc32=ordinal,
            feature_specs={},
            strategy=DEFAULT_METHOD,
            schema_version=SCHEMA_VERSION,
            target_model_version="bench",
            draft_weight_version=0,
            tokenizer_version="bench",
            vocab_map_version="bench",
            num_tokens=120,
        )
        for ordinal in range(first, end)
    ]


def _seconds(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began
