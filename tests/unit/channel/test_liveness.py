"""Who is alive, and who gets anywhere."""

import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from disagg_core.channel.contract import ClaimStatus
from disagg_core.channel.liveness import IdleWatch, PeerWatch, ProcessIdentity, holder_is_alive
from disagg_core.errors import ChannelStalled
from tests.kit.waiting import eventually
from tests.unit.channel.kit import FakeClock, dead_process, elsewhere

pytestmark = pytest.mark.unit


def claim_of(process: ProcessIdentity, **changes: object) -> ClaimStatus:
    fields = {"run_id": "r", "attempt": 1, "epoch": 1, "token": "t", **asdict(process), **changes}
    return ClaimStatus(**fields)  # type: ignore[arg-type]


def test_a_holder_is_alive_while_its_very_process_is() -> None:
    mine = claim_of(ProcessIdentity.mine())
    assert holder_is_alive(mine)
    assert not holder_is_alive(claim_of(dead_process()))
    reused = claim_of(ProcessIdentity.mine(), started=mine.started - 1)
    assert not holder_is_alive(reused), "another process has the pid now"
    assert holder_is_alive(claim_of(elsewhere())) is None


def test_a_zombie_is_dead() -> None:
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    eventually(lambda: os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None)
    started = int(Path(f"/proc/{process.pid}/stat").read_text().rpartition(") ")[2].split()[19])
    assert not holder_is_alive(claim_of(ProcessIdentity.mine(), pid=process.pid, started=started))
    process.wait()


def test_elsewhere_a_heartbeat_that_stops_changing_means_lost() -> None:
    clock = FakeClock()
    watch = PeerWatch(15.0, clock)
    assert watch.state(None) == "absent"
    assert watch.state(claim_of(elsewhere(), beat=1)) == "running"
    clock.now += 14
    assert watch.state(claim_of(elsewhere(), beat=2)) == "running"
    clock.now += 14
    assert watch.state(claim_of(elsewhere(), beat=2)) == "running"
    clock.now += 2
    assert watch.state(claim_of(elsewhere(), beat=2)) == "lost"
    assert watch.state(claim_of(elsewhere(), beat=2, released=True)) == "released"


def test_idleness_counts_from_the_last_progress_or_the_beginning_of_the_waiting() -> None:
    clock = FakeClock()
    watch = IdleWatch("writer", 60.0, clock)
    watch.check(("token", 1), lambda: "")
    clock.now += 59
    watch.check(("token", 1), lambda: "")
    clock.now += 1
    watch.check(("token", 2), lambda: "")
    clock.now += 59
    watch.stop_waiting()  # we got something, and were busy for an hour
    clock.now += 3600
    watch.check(("token", 2), lambda: "")
    clock.now += 60
    with pytest.raises(ChannelStalled, match=r"producer \(writer\) made no progress for 60\.0 s .* since .*: it slept"):
        watch.check(("token", 2), lambda: "it slept")
