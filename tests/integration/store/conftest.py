"""Clients of the store that all tests share; those that kill or stop its processes start a store of their own."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from disagg_core.contracts import Capture, RunIdentity
from disagg_core.store import MooncakeFeatureStore
from disagg_core.store.endpoints import StoreEndpoints
from disagg_core.store.master import MasterView


@pytest.fixture
def run_id(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A run of its own for each test, with the characters that run ids have."""
    return f"{tmp_path.name}.x-1"


@pytest.fixture
def identity(run_id: str) -> RunIdentity:
    return identity_of(run_id)


@pytest.fixture(scope="session")
def closer(endpoints: StoreEndpoints) -> Iterator[ThreadPoolExecutor]:
    """Closes clients beside the tests: Mooncake sleeps for a second in each close."""
    with ThreadPoolExecutor(4) as executor:
        yield executor


@pytest.fixture
def open_store(
    endpoints: StoreEndpoints, run_id: str, closer: ThreadPoolExecutor
) -> Iterator[Callable[..., MooncakeFeatureStore]]:
    """Open clients of the test's namespace, which must be empty at the end; all are closed."""
    opened: list[MooncakeFeatureStore] = []

    def open_one(**options: object) -> MooncakeFeatureStore:
        given = {"namespace": f"{run_id}/1", "staging_bytes": 8 << 20, **options}
        opened.append(MooncakeFeatureStore(endpoints, **given))
        return opened[-1]

    yield open_one
    left = MasterView(endpoints).keys(f"{run_id}/")
    for store in opened:
        closer.submit(store.close)
    assert not left


@pytest.fixture
def store(open_store: Callable[..., MooncakeFeatureStore]) -> MooncakeFeatureStore:
    return open_store()


def identity_of(run_id: str, attempt: int = 1) -> RunIdentity:
    return RunIdentity(
        run_id=run_id, attempt=attempt, strategy="eagle3", target_model_version="target-1", tokenizer_version="tok-1",
        vocab_map_version="vocab-1", draft_weight_version=0, capture=Capture((1, 2, 3), True), dtype="bfloat16",
    )  # fmt: skip


class Faults:
    """Stands between the store and the real client and spoils the calls it is told to spoil, in turn.

    ``faults.on("put_from", answer(-900), damage())`` spoils the first call one way and the second another; what comes
    after runs unspoiled. A fault is called with the real method and its arguments.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self._client: Any = None
        self._faults: dict[str, list[Callable[..., Any]]] = {}
        self._lock = threading.Lock()

    def on(self, method: str, *faults: Callable[..., Any]) -> None:
        self._faults.setdefault(method, []).extend(faults)

    def wrap(self, client: Any) -> "Faults":
        self._client = client
        return self

    def __getattr__(self, method: str) -> Callable[..., Any]:
        real = getattr(self._client, method)

        def call(*args: Any) -> Any:
            with self._lock:
                self.calls.append((method, args))
                waiting = self._faults.get(method)
                fault = waiting.pop(0) if waiting else None
            return fault(real, *args) if fault else real(*args)

        return call


@pytest.fixture
def faults() -> Faults:
    return Faults()
