"""Processes die and pause at the worst moment; what follows is a named error or the right bytes, and soon.

The light cases run with short timeouts; the slow ones with those of production, where nothing may hang over 35 seconds.
"""

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
import torch

from disagg_core.contracts import RunIdentity, SampleRef
from disagg_core.errors import SampleLost, StoreError, StoreUnavailable
from disagg_core.store import MooncakeFeatureStore, StoreServices, running_store
from disagg_core.store import services as services_module
from tests.kit.waiting import eventually

pytestmark = pytest.mark.integration

MIB = 1 << 20
LONGEST_S = 35.0
BLOCK = {"x": torch.arange(MIB), "y": torch.randn(1000)}

CHILD = """
import sys, threading
import msgspec, torch
from disagg_core.contracts import RunIdentity, SampleRef
from disagg_core.store.endpoints import StoreEndpoints
from disagg_core.store import MooncakeFeatureStore
endpoints = StoreEndpoints.model_validate_json(sys.argv[1])
identity = msgspec.json.decode(sys.argv[2], type=RunIdentity)
with MooncakeFeatureStore(endpoints, namespace="run/1") as store:
    print("open", flush=True)
    for line in sys.stdin:
        print("begin", flush=True)
        if line.strip() == "put":
            store.put("s1", {"x": torch.zeros(1 << 22)}, identity=identity, source_task_id="t", num_tokens=1)
        else:
            store.get(msgspec.json.decode(line, type=SampleRef))
        print("end", flush=True)
"""


@pytest.fixture
def services(tmp_path: Path) -> Iterator[StoreServices]:
    with running_store(96 * MIB, log_dir=tmp_path) as running:
        yield running


@pytest.fixture
def run_id() -> str:
    return "run"


@contextmanager
def opened(services: StoreServices, **options: object) -> Iterator[MooncakeFeatureStore]:
    with MooncakeFeatureStore(services.endpoints, namespace="run/1", staging_bytes=16 * MIB, **options) as store:
        yield store


def put(store: MooncakeFeatureStore, identity: RunIdentity) -> SampleRef:
    return store.put("s1", BLOCK, identity=identity, source_task_id="t", num_tokens=1)


def outcome(call: Callable[[], object]) -> tuple[object, float]:
    """Run `call`; return what it returned or the store's error it raised, and the seconds it took."""
    begin = time.monotonic()
    try:
        result = call()
    except StoreError as error:
        result = error
    return result, time.monotonic() - begin


def at_once(**calls: Callable[[], object]) -> dict[str, tuple[object, float]]:
    """Run all `calls` at the same time, each on a thread of its own; return the `outcome` of each."""
    with ThreadPoolExecutor(len(calls)) as executor:
        futures = {name: executor.submit(outcome, call) for name, call in calls.items()}
        return {name: future.result(120) for name, future in futures.items()}


def assert_whole_or_named(result: object, *named: type[StoreError]) -> None:
    if isinstance(result, dict):
        assert all(torch.equal(result[name], tensor) for name, tensor in BLOCK.items())
    else:
        assert isinstance(result, named), result


@contextmanager
def child(services: StoreServices, identity: RunIdentity) -> Iterator[subprocess.Popen[str]]:
    """A process with the store open, that puts or gets on command and dies with the block."""
    arguments = [services.endpoints.model_dump_json(), msgspec.json.encode(identity).decode()]
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        yield process
    finally:
        process.kill()
        process.wait()


def tell(process: subprocess.Popen[str], command: str) -> None:
    """Give a command and return when it has begun."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{command}\n")
    process.stdin.flush()
    assert process.stdout.readline() == "begin\n"
    threading.Event().wait(0.5)  # it is inside the native call now: the owner is stopped, so it cannot get out


@pytest.mark.parametrize("victim", ["owner", "master"])
def test_a_dead_process_is_a_named_error_soon(services: StoreServices, identity: RunIdentity, victim: str) -> None:
    with opened(services, retry_timeout_s=2.0) as store:
        ref = put(store, identity)
        assert_whole_or_named(store.get(ref))
        (services.owners[0] if victim == "owner" else services.master).process.kill()
        results = at_once(
            get=lambda: store.get(ref),
            put=lambda: put(store, identity),
            sweep=store.sweep,
            health=store.health,
            release=lambda: store.release(ref),
        )
        assert max(seconds for _, seconds in results.values()) < 15
        for name in ("get", "put") if victim == "owner" else ("get", "put", "sweep", "health"):
            assert isinstance(results[name][0], StoreUnavailable if victim == "master" else StoreError), results
        assert not isinstance(results["release"][0], StoreError)
        begin = time.monotonic()
    assert time.monotonic() - begin < 20, "closing hangs"


def test_a_producer_killed_in_the_middle_of_a_put_leaves_no_key(services: StoreServices, identity: RunIdentity) -> None:
    owner = services.owners[0].process
    with opened(services) as store:
        ref = put(store, identity)
        with child(services, identity) as producer:
            owner.send_signal(signal.SIGSTOP)
            tell(producer, "put")
            eventually(lambda: store.health().keys == 2)
            producer.kill()
            producer.wait()
            owner.send_signal(signal.SIGCONT)
        assert_whole_or_named(store.get(ref))
        assert_whole_or_named(store.get(put(store, identity)))
        assert store.sweep() == 2
        assert store.key_count() == 0


def test_a_consumer_killed_in_the_middle_of_a_get_takes_nothing_along(
    services: StoreServices, identity: RunIdentity
) -> None:
    owner = services.owners[0].process
    with opened(services) as store:
        ref = put(store, identity)
        with child(services, identity) as consumer:
            owner.send_signal(signal.SIGSTOP)
            tell(consumer, msgspec.json.encode(ref).decode())
            consumer.kill()
            consumer.wait()
            owner.send_signal(signal.SIGCONT)
        assert_whole_or_named(store.get(ref))
        store.release(ref)
        assert store.key_count() == 0
        assert store.health().used_bytes == 0
        assert store.sweep() == 0


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["owner", "master"])
@pytest.mark.parametrize("action", ["kill", "pause 30 s", "pause for good"])
def test_with_the_timeouts_of_production_nothing_hangs(
    services: StoreServices, identity: RunIdentity, victim: str, action: str
) -> None:
    process = (services.owners[0] if victim == "owner" else services.master).process
    large = {"x": torch.arange(5 * MIB // 2)}  # is read in parts
    with opened(services) as store:
        ref = put(store, identity)
        large_ref = store.put("s2", large, identity=identity, source_task_id="t", num_tokens=1)
        process.send_signal(signal.SIGKILL if action == "kill" else signal.SIGSTOP)
        resume = threading.Timer(30.0, lambda: process.send_signal(signal.SIGCONT))
        if action == "pause 30 s":
            resume.start()
        calls = {
            "get": lambda: store.get(ref),
            "put": lambda: put(store, identity),
            "large": lambda: store.get(large_ref)["x"].equal(large["x"]),
            "many": lambda: store.get_many([ref, ref])[1],
            "release": lambda: store.release(msgspec.structs.replace(ref, key="run/1/s0/gone")),
        }
        results = at_once(**calls)
        print(victim, action, {name: (str(result)[:70], round(took, 1)) for name, (result, took) in results.items()})
        assert max(took for _, took in results.values()) < LONGEST_S, results
        for name in ("get", "many"):
            assert_whole_or_named(results[name][0], StoreUnavailable)
        assert results["large"][0] is True or isinstance(results["large"][0], StoreUnavailable)
        assert isinstance(results["put"][0], (SampleRef, StoreUnavailable))
        resume.join() if action == "pause 30 s" else resume.cancel()
        if action != "kill":
            process.send_signal(signal.SIGCONT)
            eventually(lambda: isinstance(outcome(lambda: store.get(ref))[0], dict))
            eventually(lambda: store.counters["parked_removals"] == 0, within_s=150)
            store.sweep()
            assert store.key_count() == 0
            eventually(lambda: store.health().keys == 0, within_s=150)


@pytest.mark.slow
def test_a_restarted_master_has_lost_the_samples_and_serves_again(
    services: StoreServices, identity: RunIdentity, tmp_path: Path
) -> None:
    host, port = services.endpoints.master_address.split(":")
    metrics_port = services.endpoints.metrics_address.split(":")[1]
    with opened(services, put_timeout_s=60) as store:
        ref = put(store, identity)
        services.master.process.kill()
        services.master.process.wait()
        command = services_module._master_command(host, int(port), int(metrics_port), 60)
        with (tmp_path / "again.log").open("wb") as log:
            again = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            result, seconds = outcome(lambda: store.get(ref))
            assert isinstance(result, (SampleLost, StoreUnavailable))
            assert seconds < LONGEST_S
            eventually(lambda: isinstance(outcome(lambda: put(store, identity))[0], SampleRef))
            fresh = put(store, identity)
            assert_whole_or_named(store.get(fresh))
            with pytest.raises(SampleLost):
                store.get(ref)
            store.release(ref)
            store.sweep()
            assert store.key_count() == 0
        finally:
            again.terminate()
            again.wait()
