"""One thread polls and another one acknowledges, as the loader has them, while the cursor cannot always be written."""

from __future__ import annotations

import queue
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from disagg_core.channel import StreamingRefQueue
from disagg_core.channel.contract import Cursor
from disagg_core.contracts import SampleRef
from disagg_core.errors import ChannelUnavailable
from disagg_core.processes.retry import Retry
from tests.integration.channel.conftest import Place
from tests.kit.waiting import PATIENCE_S
from tests.unit.channel.kit import make_ref, totals_of

pytestmark = pytest.mark.integration

TOTAL, WINDOW = 400, 7
again = Retry(ChannelUnavailable, budget_s=PATIENCE_S, every_s=0.0)


class Trouble:
    """Writes of the cursor that fail at random, before they take effect or after; what was written is noted."""

    def __init__(self, store: Callable[[Cursor], None], seed: int) -> None:
        self._store = store
        self._drawn = random.Random(seed)
        self.written: list[tuple[int, int]] = []

    def __call__(self, cursor: Cursor) -> None:
        chance = self._drawn.random()
        if chance < 0.2:
            raise ChannelUnavailable("no space")
        self._store(cursor)
        self.written.append((cursor.seq, cursor.refs))
        if chance < 0.35:
            raise ChannelUnavailable("the answer was lost")


def acknowledge(refs: StreamingRefQueue, windows: queue.SimpleQueue[list[SampleRef] | None]) -> None:
    """Acknowledge windows until there is none; of every third one the first sample could not be used."""
    for step, window in enumerate(iter(windows.get, None), start=1):
        if step % 3 == 0:
            again(refs.fail, [window.pop(0)], "not finite", retryable=False)
        again(refs.ack, window, step=step)


@pytest.mark.parametrize("seed", range(4))
def test_whatever_write_fails_every_reference_is_behind_the_cursor_once(
    place: Place, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = random.Random(seed)
    writer, reader = place.open(), place.open(max_draft_lag=2, draft_version=lambda: 5)
    published = [make_ref(n, draft_weight_version=drawn.choice([1, 5, 5, 5])) for n in range(TOTAL)]
    trouble = Trouble(reader._backend.store_cursor, seed)
    monkeypatch.setattr(reader._backend, "store_cursor", trouble)
    refs, got = StreamingRefQueue(reader), []
    windows: queue.SimpleQueue[list[SampleRef] | None] = queue.SimpleQueue()
    for first in range(0, TOTAL, 100):
        writer.publish_many(published[first : first + 100])
    writer.close(totals_of(published))
    with ThreadPoolExecutor(1) as thread:
        acknowledging = thread.submit(acknowledge, refs, windows)
        while window := again(refs.get, WINDOW):
            got += window
            if len(got) % 5 == 0:
                again(refs.fail, [window.pop()], "the restored weights were trained on it already", retryable=False)
            windows.put(window)
        windows.put(None)
        acknowledging.result(PATIENCE_S)
    again(reader.finish, "end of stream")

    assert [ref for ref in published if ref not in reader.dropped] == got
    cursor = reader._backend.load_cursor()
    assert (cursor.refs, cursor.dropped, cursor.quarantined) == (TOTAL, len(reader.dropped), len(refs.quarantined))
    assert trouble.written == sorted(trouble.written), "never back"
    assert writer.in_flight_remote() == 0
