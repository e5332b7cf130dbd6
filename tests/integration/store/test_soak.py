"""Many samples through a small store while producers and consumers are killed: each exact, each once, nothing left."""

import queue
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import msgspec
import psutil
import pytest

from disagg_core.contracts import RunIdentity, SampleRef
from disagg_core.store import MooncakeFeatureStore, running_store
from disagg_core.store.endpoints import StoreEndpoints
from tests.kit.waiting import eventually

pytestmark = pytest.mark.integration

WINDOW = 32
WORKER = Path(__file__).with_name("soak_worker.py")


class Role:
    """A worker process that is fed commands, and started anew with what it had not finished when it is killed."""

    def __init__(self, role: str, endpoints: StoreEndpoints, identity: RunIdentity, largest: int) -> None:
        arguments = [role, endpoints.model_dump_json(), msgspec.json.encode(identity).decode(), str(largest)]
        self._command = [sys.executable, str(WORKER), *arguments]
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.unfinished: dict[str, str] = {}
        self.waiting: list[tuple[str, str]] = []
        self.starts = 0
        self.start()

    def start(self) -> None:
        self.starts += 1
        self.process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._reader = threading.Thread(target=self._read, args=(self.process.stdout,))
        self._reader.start()

    def feed(self) -> None:
        """Keep `WINDOW` commands under way."""
        while self.waiting and len(self.unfinished) < WINDOW:
            name, command = self.waiting.pop(0)
            self.unfinished[name] = command
            self.process.stdin.write(f"{command}\n")
        self.process.stdin.flush()

    def lines(self) -> list[str]:
        """What was finished since the last call."""
        return [self._lines.get() for _ in range(self._lines.qsize())]

    def kill(self) -> list[str]:
        """SIGKILL; return the last lines. What was under way is first in line again."""
        self.stop(kill=True)
        return self.lines()

    def restart(self) -> None:
        self.waiting = [*self.unfinished.items(), *self.waiting]
        self.unfinished.clear()
        self.start()

    def stop(self, kill: bool = False) -> None:
        if kill:
            self.process.kill()
        try:
            self.process.stdin.close()
        except BrokenPipeError:
            assert kill
        self.process.wait(120)
        self._reader.join()

    def _read(self, stream: object) -> None:
        for line in stream:
            if line.endswith("\n"):  # a killed process may have written half a line
                self._lines.put(line.strip())


class Soak:
    """The part of the channel and of the accounting: publishes, acknowledges, frees, and kills at random."""

    def __init__(self, store: MooncakeFeatureStore, identity: RunIdentity, samples: int, largest: int) -> None:
        self.store, self.samples = store, samples
        self.producer = Role("produce", store.endpoints, identity, largest)
        self.consumer = Role("consume", store.endpoints, identity, largest)
        self.producer.waiting = [(str(ordinal), str(ordinal)) for ordinal in range(samples)]
        self.refs: dict[str, SampleRef] = {}
        self.verdicts: Counter[str] = Counter()
        self.most_used = 0

    def published(self, lines: list[str]) -> None:
        for line in lines:
            ref = msgspec.json.decode(line, type=SampleRef)
            assert ref.sample_id not in self.refs, "published twice"
            del self.producer.unfinished[ref.sample_id]
            self.refs[ref.sample_id] = ref
            self.consumer.waiting.append((ref.sample_id, line))

    def consumed(self, lines: list[str]) -> None:
        for line in lines:
            name, verdict = line.split()
            assert verdict == "exact", line
            del self.consumer.unfinished[name]
            self.verdicts[name] += 1
            self.store.release(self.refs[name])

    def run(self, kills: int, timeout_s: float) -> None:
        rng, deadline, pause = random.Random(0), time.monotonic() + timeout_s, threading.Event()
        points = sorted(rng.randrange(self.samples) for _ in range(kills))
        while len(self.verdicts) < self.samples:
            assert time.monotonic() < deadline, f"{len(self.verdicts)} of {self.samples} in {timeout_s} s"
            assert self.producer.process.poll() is None
            assert self.consumer.process.poll() is None
            self.published(self.producer.lines())
            self.consumed(self.consumer.lines())
            if points and len(self.verdicts) >= points[0]:
                points.pop(0)
                if len(points) % 2:
                    self.published(self.producer.kill())
                    self.producer.restart()
                else:
                    self.consumed(self.consumer.kill())
                    self.consumer.restart()
            self.producer.feed()
            self.consumer.feed()
            self.most_used = max(self.most_used, self.store.health().used_bytes)
            pause.wait(0.02)

    def close(self) -> None:
        for role in (self.producer, self.consumer):
            role.stop(kill=role.process.poll() is None and bool(role.unfinished))


@pytest.mark.parametrize(
    ("samples", "largest", "capacity", "kills", "timeout_s"),
    [
        pytest.param(600, 200_000, 16 << 20, 2, 120, id="light", marks=pytest.mark.slow),
        pytest.param(
            20_000, 2_000_000, 256 << 20, 12, 2400, id="full", marks=[pytest.mark.slow, pytest.mark.timeout(3000)]
        ),
    ],
)
def test_every_sample_arrives_exactly_once_and_nothing_is_left(
    tmp_path: Path, samples: int, largest: int, capacity: int, kills: int, timeout_s: float,
    identity: RunIdentity, run_id: str,
) -> None:  # fmt: skip
    begin = time.monotonic()
    with (
        running_store(capacity, log_dir=tmp_path) as services,
        MooncakeFeatureStore(services.endpoints, namespace=f"{run_id}/1") as store,
    ):
        owner = psutil.Process(services.owners[0].process.pid)
        resident = owner.memory_info().rss
        soak = Soak(store, identity, samples, largest)
        try:
            soak.run(kills, timeout_s)
        finally:
            soak.close()
        grown = owner.memory_info().rss - resident
        orphans = store.sweep()
        print(
            f"{samples} samples, {sum(ref.size_bytes for ref in soak.refs.values()) / 1e9:.2f} GB, "
            f"{time.monotonic() - begin:.0f} s, {soak.producer.starts - 1}+{soak.consumer.starts - 1} kills, "
            f"most used {soak.most_used / 2**20:.0f} MiB, owner grew {grown / 2**20:.1f} MiB, {orphans} orphans swept"
        )
        assert set(soak.verdicts.values()) == {1}
        assert len(soak.verdicts) == samples
        assert orphans <= 2 * soak.producer.starts, "more is left than killed puts can leave"
        assert store.key_count() == 0
        assert store.health().evicted == 0
        assert grown < 32 << 20
        if samples > 10_000:  # half-written objects of killed puts are the master's to discard, after a minute or two
            eventually(lambda: store.health().keys == 0 and store.health().used_bytes == 0, within_s=240)
