"""What could not be removed is tried until it is gone; keys of failed puts are removed twice."""

from collections.abc import Sequence

import pytest

from disagg_core.errors import StoreUnavailable
from disagg_core.store import reclaimer as module
from disagg_core.store.reclaimer import Reclaimer
from tests.kit.waiting import eventually

pytestmark = pytest.mark.unit


class Store:
    """Keys, and a number of failures before it answers."""

    def __init__(self, *keys: str, failures: int = 0) -> None:
        self.keys, self.failures = set(keys), failures
        self.tries: list[str] = []

    def remove(self, keys: Sequence[str]) -> list[int]:
        self.tries += keys
        if self.failures:
            self.failures -= 1
            raise StoreUnavailable("away")
        codes = [0 if key in self.keys else -704 for key in keys]
        self.keys -= set(keys)
        return codes


def test_a_store_that_comes_back_is_cleaned() -> None:
    store = Store("a", "b", failures=2)
    reclaimer = Reclaimer(store.remove)
    reclaimer.park(["a", "b", "gone"])
    eventually(lambda: len(reclaimer) == 0)
    assert store.keys == set()
    assert reclaimer.removed == 3
    assert reclaimer.stop(1) == 0


def test_a_put_that_lands_after_its_removal_is_removed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SETTLE_S", 0.2)
    store = Store()
    reclaimer = Reclaimer(store.remove)
    reclaimer.park(["late"], doubtful=True)
    eventually(lambda: store.tries == ["late"])
    store.keys.add("late")
    eventually(lambda: len(reclaimer) == 0)
    assert store.keys == set()
    assert reclaimer.stop(1) == 0


def test_stopping_says_how_many_are_left() -> None:
    store = Store("a", "b", failures=1000)
    reclaimer = Reclaimer(store.remove)
    reclaimer.park(["a", "b"])
    assert reclaimer.stop(0.3) == 2


def test_retry_does_not_wait_for_the_next_turn() -> None:
    store = Store("a", failures=1)
    reclaimer = Reclaimer(store.remove)
    reclaimer.park(["a"])
    eventually(lambda: len(store.tries) == 1)
    eventually(lambda: reclaimer.retry() == 1 or not store.keys)
    assert store.keys == set()
    reclaimer.stop(1)


def test_there_is_an_end_to_what_is_parked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_PARKED", 3)
    reclaimer = Reclaimer(Store(failures=1000).remove)
    reclaimer.park(["a", "b", "c"])
    with pytest.raises(StoreUnavailable, match="parked"):
        reclaimer.park(["d"])
    reclaimer.stop(0)
