"""Windows are settled in the background: acknowledged, then removed, in order, all of them, and no error is lost."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from disagg_core.errors import ChannelError, ChannelUnavailable, Preempted, StoreError, StoreUnavailable
from disagg_core.training import settling as module
from disagg_core.training.settling import Settling

pytestmark = pytest.mark.unit


class Store:
    """Removes what it is told once it may."""

    def __init__(self) -> None:
        self.may, self.did = threading.Event(), []
        self.error: Exception | None = None

    def acknowledge(self, name: str) -> Callable[[], None]:
        return lambda: self.did.append(f"acknowledged {name}")

    def release_many(self, refs: list[Any]) -> None:
        assert self.may.wait(60)
        if self.error is not None:
            raise self.error
        self.did.append(f"removed {'-'.join(refs)}")


@pytest.fixture
def store() -> Iterator[Any]:
    made = Store()
    yield made
    made.may.set()


def test_a_step_waits_for_nothing_until_too_many_windows_are_not_settled(store: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "WINDOWS_AHEAD", 2)
    settling, third = Settling(store), threading.Event()
    settling.settle(store.acknowledge("a"), ["a"])
    settling.settle(store.acknowledge("b"), ["b"])

    def next_window() -> None:
        settling.settle(store.acknowledge("c"), ["c"])
        third.set()

    waiting = threading.Thread(target=next_window)
    waiting.start()
    assert not third.wait(0.05)
    store.may.set()
    waiting.join(60)
    settling.close()

    assert third.is_set()
    assert store.did == [f"{done} {name}" for name in "abc" for done in ("acknowledged", "removed")]


def test_waiting_and_closing_wait_for_the_last_window(store: Any) -> None:
    settling = Settling(store)
    settling.settle(store.acknowledge("a"), ["a"])

    assert not settling.wait(0.0)
    threading.Timer(0.01, store.may.set).start()
    assert settling.wait(60)
    assert store.did == ["acknowledged a", "removed a"]
    settling.settle(store.acknowledge("b"), [])
    settling.close()
    settling.close()

    assert store.did[2:] == ["acknowledged b"], "what another rank frees is not removed here"


def test_a_store_that_takes_no_more_removals_is_told_with_a_later_window(store: Any) -> None:
    settling = Settling(store)
    store.may.set()
    store.error = StoreUnavailable("away too long")
    settling.settle(store.acknowledge("a"), ["a"])

    with pytest.raises(StoreError, match="away too long"):
        settling.wait(60)
    settling.close()


@pytest.mark.parametrize("error", [ChannelUnavailable("no space"), Preempted("asked to stop")])
def test_after_a_window_that_cannot_be_acknowledged_none_is_tried_and_all_are_removed(
    store: Any, error: ChannelError | Preempted
) -> None:
    settling = Settling(store)
    store.may.set()

    def fails() -> None:
        raise error

    settling.settle(store.acknowledge("a"), ["a"])
    settling.settle(fails, ["b"])
    settling.settle(store.acknowledge("c"), ["c"])

    assert settling.wait(60)
    assert settling.unacknowledged is error
    assert store.did == ["acknowledged a", "removed a", "removed b", "removed c"]


@pytest.mark.parametrize("error", [StoreUnavailable("away too long"), KeyError("a bug")])
def test_what_removals_ended_with_is_logged_at_the_end_and_a_bug_is_raised(
    store: Any, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    settling = Settling(store)
    store.error = error
    settling.settle(store.acknowledge("a"), ["a"])
    settling.settle(store.acknowledge("b"), [])
    store.may.set()

    if isinstance(error, StoreError):
        settling.close()
        assert "left to the sweep: away too long" in caplog.text
    else:
        with pytest.raises(KeyError, match="a bug"):
            settling.close()
    assert "acknowledged b" in store.did
