"""What a run does about its store before each attempt: a restarted one is waited for, a small one is refused."""

import asyncio
import logging
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

import pytest
import torch

from disagg_core.errors import StoreTooLarge, StoreUnavailable
from disagg_core.processes.tree import free_ports
from disagg_core.run.plan import RunPlan, make_plan
from disagg_core.run_spec.yaml_file import load_spec
from disagg_core.store import MooncakeFeatureStore, managed_store
from disagg_core.store.endpoints import StoreEndpoints
from disagg_core.store.master import MasterView
from disagg_core.target.facts import read_target_facts
from tasks import mooncake
from tasks.mooncake import FeatureStoreServices
from tests.integration.store.conftest import identity_of

pytestmark = pytest.mark.integration

DEMO = Path(__file__).resolve().parents[3] / "infra" / "runs" / "demo.yaml"
MIB = 1 << 20
log = logging.LoggerAdapter(logging.getLogger(__name__), {})


class External:
    """A store that somebody else starts and stops, always at the same address."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._ports = free_ports("127.0.0.1", 2)
        self._running = ExitStack()

    def start(self, capacity: int = 64 * MIB) -> StoreEndpoints:
        return self._running.enter_context(self.run(capacity))

    def run(self, capacity: int) -> AbstractContextManager[StoreEndpoints]:
        master, metrics = self._ports
        return managed_store(capacity, log_dir=self._logs, master_port=master, metrics_port=metrics)

    def stop(self) -> None:
        self._running.close()

    def plan(self, root: Path, *, stall_timeout_s: float = 60.0) -> RunPlan:
        master, metrics = (f"127.0.0.1:{port}" for port in self._ports)
        given = ["mode=external", f"master_address={master}", f"metrics_address={metrics}", "capacity=64MiB"]
        stall = f"orchestration.stall_timeout_s={stall_timeout_s}"
        return plan_of(root, [*(f"store.{option}" for option in given), stall])


def plan_of(root: Path, overrides: list[str]) -> RunPlan:
    spec = load_spec(DEMO, overrides)
    return make_plan(spec, read_target_facts(spec.target), run_id="night-1", root=root, total_prompts=100)


def ready(services: FeatureStoreServices, attempt: int) -> StoreEndpoints:
    return asyncio.run(services.prepare(attempt, log))


@pytest.fixture
def external(tmp_path: Path) -> Iterator[External]:
    store = External(tmp_path / "external")
    yield store
    store.stop()


def test_an_external_store_that_restarts_between_attempts_is_waited_for(tmp_path: Path, external: External) -> None:
    endpoints = external.start()
    services = FeatureStoreServices(external.plan(tmp_path))
    assert ready(services, 1) == endpoints
    external.stop()
    waited = threading.Timer(8.0, external.start)  # longer than one look at it takes
    waited.start()
    assert ready(services, 2) == endpoints
    waited.join()


def test_an_owner_that_is_still_starting_is_no_fault_of_the_runs(
    tmp_path: Path, external: External, caplog: pytest.LogCaptureFixture
) -> None:
    external.start(64 * MIB)
    services = FeatureStoreServices(external.plan(tmp_path))
    ready(services, 1)
    external.stop()
    external.start(32 * MIB)
    later = threading.Timer(1.0, lambda: (external.stop(), external.start(64 * MIB)))
    later.start()
    with caplog.at_level(logging.WARNING):
        ready(services, 2)
    later.join()
    assert f"it has {32 * MIB} of {64 * MIB} bytes" in caplog.text


def test_an_external_store_that_was_never_large_enough_is_refused(
    tmp_path: Path, external: External, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mooncake, "_OWNERS_JOIN_S", 0.5)
    external.start(32 * MIB)
    with pytest.raises(StoreTooLarge, match=f"{32 * MIB} bytes, {64 * MIB} are asked for"):
        ready(FeatureStoreServices(external.plan(tmp_path)), 1)


def test_an_external_store_that_stays_away_is_a_lost_store(tmp_path: Path, external: External) -> None:
    external.start()
    services = FeatureStoreServices(external.plan(tmp_path, stall_timeout_s=1.0))
    ready(services, 1)
    external.stop()
    with pytest.raises(StoreUnavailable, match=r"waited for over 1 s \(orchestration.stall_timeout_s\)") as raised:
        ready(services, 2)
    assert raised.value.failure_class == "store_lost"


def test_what_an_earlier_attempt_left_is_removed(tmp_path: Path, external: External) -> None:
    endpoints = external.start()
    with MooncakeFeatureStore(endpoints, namespace="night-1/1") as store:
        store.put("s1", {"x": torch.ones(3)}, identity=identity_of("night-1"), source_task_id="t", num_tokens=1)
    ready(FeatureStoreServices(external.plan(tmp_path)), 2)
    assert MasterView(endpoints).keys() == []


def test_a_store_of_ours_that_was_lost_is_started_anew(tmp_path: Path) -> None:
    services = FeatureStoreServices(plan_of(tmp_path, ["store.capacity=64MiB"]))
    try:
        first = ready(services, 1)
        assert services._managed is not None
        services._managed.owners[0].process.kill()
        services._managed.owners[0].process.wait()
        with pytest.raises(StoreUnavailable):
            services.require_alive()
        assert ready(services, 2) != first
        services.require_alive()
    finally:
        services.stop()


def test_memory_that_is_not_free_again_yet_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    services = FeatureStoreServices(plan_of(tmp_path, ["store.capacity=64MiB"]))
    start, refusals = mooncake.running_store, [StoreTooLarge("there is room for 5 bytes")]

    def crowded(*args: object, **options: object) -> object:
        if refusals:
            raise refusals.pop()
        return start(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(mooncake, "running_store", crowded)
    with pytest.raises(StoreTooLarge):
        ready(services, 1)
    try:
        ready(services, 1)
        services.stop()
        refusals.append(StoreTooLarge("there is room for 5 bytes"))
        ready(services, 2)
        assert refusals == []
    finally:
        services.stop()
