"""Samples of acknowledged windows are removed in the background: in order, all of them, and no error is lost."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from disagg_core.errors import StoreError, StoreUnavailable
from disagg_core.training.freeing import Freeing

pytestmark = pytest.mark.unit


class Store:
    """Removes what it is told once it may."""

    def __init__(self) -> None:
        self.may, self.removed = threading.Event(), []
        self.error: Exception | None = None

    def release_many(self, refs: list[Any]) -> None:
        assert self.may.wait(60)
        if self.error is not None:
            raise self.error
        self.removed.append(refs)


@pytest.fixture
def store() -> Iterator[Any]:
    made = Store()
    yield made
    made.may.set()


def test_a_step_does_not_wait_for_the_removal_but_the_one_after_it_does(store: Any) -> None:
    freeing, second = Freeing(store), threading.Event()
    freeing.free(["a"])
    assert store.removed == []

    def next_window() -> None:
        freeing.free(["b"])
        second.set()

    waiting = threading.Thread(target=next_window)
    waiting.start()
    assert not second.is_set()
    store.may.set()
    waiting.join(60)
    freeing.close()

    assert second.is_set()
    assert store.removed == [["a"], ["b"]]


def test_closing_waits_for_the_last_removal(store: Any) -> None:
    freeing = Freeing(store)
    freeing.free(["a"])
    threading.Timer(0.01, store.may.set).start()

    freeing.close()
    freeing.close()

    assert store.removed == [["a"]]


def test_a_store_that_takes_no_more_removals_is_told_with_the_next_window(store: Any) -> None:
    freeing = Freeing(store)
    store.may.set()
    store.error = StoreUnavailable("away too long")
    freeing.free(["a"])

    with pytest.raises(StoreError, match="away too long"):
        freeing.free(["b"])
    freeing.close()


def test_what_the_last_removal_ended_with_is_logged_and_a_bug_is_raised(
    store: Any, caplog: pytest.LogCaptureFixture
) -> None:
    store.may.set()
    for error in (StoreUnavailable("away too long"), AssertionError("a bug")):
        store.error = error
        freeing = Freeing(store)
        freeing.free(["a"])
        if isinstance(error, AssertionError):
            with pytest.raises(AssertionError, match="a bug"):
                freeing.close()
        else:
            freeing.close()
            assert "left to the sweep: away too long" in caplog.text
