"""A producer and a consumer that may be killed at any moment, each in a process of its own."""

from __future__ import annotations

import random
import sys
from pathlib import Path

from disagg_core.channel import StreamingRefChannel, StreamingRefQueue
from disagg_core.contracts import StreamTotals
from disagg_core.errors import ChannelBusy
from disagg_core.rollout.flow_control import FlowControl
from disagg_core.run.watermarks import Watermarks
from tests.unit.channel.kit import make_refs

WINDOW = 8


def produce(url: str, stop: Path, *, reader_stays: bool = False) -> None:
    """Publish in order, going on behind what the stream holds, until the file `stop` is there; then end the stream."""
    channel = StreamingRefChannel(url, idle_timeout_s=60.0)
    channel.claim_writer()
    ordinal = len(list(channel.published_sample_ids()))
    assert ordinal == channel.published
    flow = FlowControl(Watermarks(window=WINDOW, high_refs=64))
    while not stop.exists() and not channel.is_closed():
        while not flow.may_publish(channel.in_flight_remote(), channel.in_flight_bytes_remote()):
            status = channel.wait_for_reader_change(0.05)
            assert status.active or not reader_stays, status.describe()
        count = random.randint(1, 12)
        channel.publish_many(make_refs(ordinal, ordinal + count))
        ordinal += count
    if not channel.is_closed():
        totals = StreamTotals(refs=channel.published, bytes=channel.published_bytes, prompts=ordinal, rejected=0)
        channel.close(totals)
    channel.disconnect()


def consume(url: str, log: Path) -> None:
    """Take windows; write down where this process started and what it took, and acknowledge it."""
    with log.open("a", buffering=1) as file, StreamingRefChannel(url, idle_timeout_s=60.0) as channel:
        channel.claim_reader()
        file.write(f"start {channel.delivered}\n")
        queue = StreamingRefQueue(channel)
        step = 0
        while refs := queue.get(WINDOW, timeout=60.0):
            file.write("window " + " ".join(ref.sample_id for ref in refs) + "\n")
            step += 1
            queue.ack(refs, step=step)
        totals = queue.totals
        assert totals is not None
        file.write(f"end {totals.refs} {totals.bytes}\n")
        channel.finish("the stream has ended")


def consume_until_free(url: str, log: Path) -> None:
    """Consume; a claim that is still held by a process that is just being killed is tried again."""
    for _ in range(100):
        try:
            return consume(url, log)
        except ChannelBusy:
            continue
    raise AssertionError("the claim was never free")


def trained(log: Path) -> tuple[list[str], tuple[int, int] | None]:
    """Return the sample ids that were acknowledged, from what the consumers wrote down, and the totals that they read.

    Each consumer starts where the cursor says; what an earlier one took behind that it never acknowledged.
    """
    ids: list[str] = []
    totals = None
    for line in log.read_text().splitlines():
        kind, *words = line.split()
        if kind == "start":
            assert int(words[0]) <= len(ids), "a consumer started behind references that nobody took"
            del ids[int(words[0]) :]
        elif kind == "window":
            ids += words
        else:
            totals = (int(words[0]), int(words[1]))
    return ids, totals


if __name__ == "__main__":
    side, address, path = sys.argv[1:]
    if side == "produce":
        produce(address, Path(path), reader_stays=True)
    else:
        consume(address, Path(path))
