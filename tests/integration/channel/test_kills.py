"""Writer and reader killed with SIGKILL at random moments: nothing lost, nothing doubled, totals right."""

import random
import threading
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest

from tests.integration.channel import peer
from tests.integration.channel.conftest import Place
from tests.integration.forks import FORKS
from tests.unit.channel.kit import make_refs, names, totals_of

pytestmark = pytest.mark.integration


def storm(place: Place, tmp_path: Path, kills: int, seed: int) -> dict[str, int]:
    """Run both sides, kill one or the other again and again, then let them finish."""
    rng = random.Random(seed)
    stop, log = tmp_path / "stop", tmp_path / "log"

    def start(target: Callable[..., None], path: Path) -> ForkServerProcess:
        process = FORKS.Process(target=target, args=(place.url, path), daemon=True)
        process.start()
        return process

    sides = {"writer": start(peer.produce, stop), "reader": start(peer.consume_until_free, log)}
    made = {"writer": (peer.produce, stop), "reader": (peer.consume_until_free, log)}
    killed = {"writer": 0, "reader": 0}
    try:
        while sum(killed.values()) < kills:
            threading.Event().wait(rng.uniform(0.0, 0.25))
            side = rng.choice(["writer", "reader"])
            assert sides[side].is_alive(), f"the {side} ended by itself: exit code {sides[side].exitcode}"
            sides[side].kill()
            sides[side].join(10)
            killed[side] += 1
            sides[side] = start(*made[side])
        threading.Event().wait(0.3)
        stop.touch()
        for side, process in sides.items():
            process.join(60)
            assert process.exitcode == 0, f"the {side} failed"
    finally:
        for process in sides.values():
            if process.is_alive():
                process.kill()
                process.join(10)
    ids, totals = peer.trained(log)
    assert ids == names(len(ids)), "lost, doubled or out of order"
    expected = totals_of(make_refs(len(ids)))
    assert totals == (expected.refs, expected.bytes)
    return {**killed, "references": len(ids)}


def test_a_few_kills(place: Place, tmp_path: Path) -> None:
    assert storm(place, tmp_path, kills=8, seed=1)["references"] > 0


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_hundred_kills(place: Place, tmp_path: Path) -> None:
    print(place.kind, storm(place, tmp_path, kills=100, seed=2))
