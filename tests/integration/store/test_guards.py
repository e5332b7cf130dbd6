"""Use where the native client would hang, crash or corrupt is a named error instead."""

import gc
import os
import socket
import threading
import time
from collections.abc import Callable

import pytest
import torch

from disagg_core.contracts import RunIdentity
from disagg_core.errors import BadInput, StoreMisuse, StoreUnavailable
from disagg_core.store import MooncakeFeatureStore, probe_store
from disagg_core.store.endpoints import StoreEndpoints

pytestmark = pytest.mark.integration

SAMPLE = {"x": torch.arange(100)}


def operations(store: MooncakeFeatureStore, identity: RunIdentity) -> dict[str, Callable[[], object]]:
    ref = store.put("s1", SAMPLE, identity=identity, source_task_id="t", num_tokens=1)
    return {
        "put": lambda: store.put("s2", SAMPLE, identity=identity, source_task_id="t", num_tokens=1),
        "put_many": lambda: store.put_many([], identity=identity),
        "submit_put": lambda: store.submit_put("s2", SAMPLE, identity=identity, source_task_id="t", num_tokens=1),
        "get": lambda: store.get(ref),
        "get_many": lambda: store.get_many([ref]),
        "submit_get": lambda: store.submit_get(ref),
        "abort": lambda: store.abort(ref),
        "gc": store.gc,
        "sweep": store.sweep,
        "release": lambda: store.release(ref),
    }


def test_every_operation_after_close_is_refused(
    store: MooncakeFeatureStore, open_store: Callable[..., MooncakeFeatureStore], identity: RunIdentity
) -> None:
    calls = operations(store, identity)
    store.close()
    store.close()
    for call in calls.values():
        with pytest.raises(StoreMisuse, match="after close"):
            call()
    assert open_store().sweep() == 1


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")
def test_every_operation_in_a_forked_child_is_refused_and_the_parent_goes_on(
    store: MooncakeFeatureStore, identity: RunIdentity
) -> None:
    calls = operations(store, identity)
    child = os.fork()
    if child == 0:
        refused = 0
        for call in calls.values():
            try:
                call()
            except StoreMisuse as error:
                refused += "forked child" in str(error)
        store.close()
        os._exit(0 if refused == len(calls) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    for call in calls.values():
        call()
    assert store.sweep() == 0


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")
def test_a_forked_child_may_drop_the_store_it_has_inherited(endpoints: StoreEndpoints, run_id: str) -> None:
    held = [MooncakeFeatureStore(endpoints, namespace=f"{run_id}/1")]

    child = os.fork()
    if child == 0:
        held.clear()
        gc.collect()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert held[0].sweep() == 0
    held[0].close()


def test_without_a_master_opening_fails_soon(endpoints: StoreEndpoints) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        gone = endpoints.model_copy(update={"master_address": f"127.0.0.1:{nobody.getsockname()[1]}"})
    begin = time.monotonic()
    with pytest.raises(StoreUnavailable, match=f"{gone.master_address}.*start it, or correct"):
        MooncakeFeatureStore(gone, namespace="run/1", connect_timeout_s=0.5)
    assert time.monotonic() - begin < 30


def test_something_else_that_listens_is_not_taken_for_a_master() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        wrong = StoreEndpoints(master_address=address, metrics_address=address)
        accepting = threading.Thread(target=_answer_like_a_web_server, args=(other,), daemon=True)
        accepting.start()
        with pytest.raises(StoreUnavailable, match="metrics"):
            MooncakeFeatureStore(wrong, namespace="run/1", connect_timeout_s=0.5)
        with pytest.raises(StoreUnavailable, match="metrics"):
            probe_store(wrong)


def _answer_like_a_web_server(server: socket.socket) -> None:
    while True:
        try:
            connection, _ = server.accept()
        except OSError:
            return
        with connection:
            connection.sendall(b"HTTP/1.0 404 Not Found\r\nContent-Length: 0\r\n\r\n")


@pytest.mark.parametrize("address", ["localhost", "127.0.0.1:", ":5", "127.0.0.1:99999", "127.0.0.1:abc"])
def test_an_address_that_is_none_is_named(endpoints: StoreEndpoints, address: str) -> None:
    with pytest.raises(BadInput, match=f"master_address: expected host:port, found '{address}'"):
        MooncakeFeatureStore(endpoints.model_copy(update={"master_address": address}), namespace="run/1")


@pytest.mark.parametrize("options", [{"namespace": ""}, {"namespace": "run/1/"}, {"staging_bytes": 0}, {"threads": 0}])
def test_options_out_of_range_are_named(endpoints: StoreEndpoints, options: dict[str, object]) -> None:
    with pytest.raises(BadInput, match=next(iter(options))):
        MooncakeFeatureStore(endpoints, **{"namespace": "run/1", **options})
