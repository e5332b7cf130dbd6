"""Two hosts without a shared mount: two network namespaces, a Redis server in one of them, a link that is cut.

Each side also has a pid and a host name space of its own, so that neither can see the other's processes: liveness is
judged by heartbeats, as between real hosts.
"""

import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.integration.channel import peer
from tests.integration.two_hosts import HOSTS, ip, started
from tests.kit.waiting import eventually
from tests.unit.channel.kit import make_refs, names, totals_of

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(240)]

CUT_S = 10.0


def reachable(space: str, host: str, port: int) -> bool:
    code = f"import socket; socket.create_connection(({host!r}, {port}), 1)"
    return not subprocess.run(
        ["ip", "netns", "exec", space, sys.executable, "-c", code], capture_output=True, check=False
    ).returncode


@pytest.mark.parametrize("server_at", ["producer", "consumer"])
def test_a_whole_stream_crosses_a_link_that_is_cut_for_ten_seconds(
    two_hosts: dict[str, str], tmp_path: Path, server_at: str
) -> None:
    stop, taken, port = tmp_path / "stop", tmp_path / "taken", 6379
    url = f"redis://{HOSTS[server_at]}:{port}/0?channel=two-hosts"
    taken.touch()
    with ExitStack() as cleanup:
        server = ["redis-server", "--port", str(port), "--protected-mode", "no", "--save", "", "--dir", str(tmp_path)]
        started(cleanup, two_hosts[server_at], server, tmp_path / "redis.log")
        eventually(lambda: all(reachable(space, HOSTS[server_at], port) for space in two_hosts.values()))
        module = [sys.executable, "-m", "tests.integration.channel.peer"]
        producer = started(cleanup, two_hosts["producer"], [*module, "produce", url, str(stop)], tmp_path / "p.log")
        consumer = started(cleanup, two_hosts["consumer"], [*module, "consume", url, str(taken)], tmp_path / "c.log")

        def windows() -> int:
            return taken.read_text().count("window")

        eventually(lambda: windows() > 20)
        ip("-n", two_hosts["consumer"], "link", "set", "link0", "down")
        began = time.monotonic()
        threading.Event().wait(1.0)
        at_cut = windows()
        threading.Event().wait(CUT_S - (time.monotonic() - began))
        assert windows() <= at_cut + 64 // peer.WINDOW + 1, "the link was not cut"
        during = windows()
        ip("-n", two_hosts["consumer"], "link", "set", "link0", "up")
        eventually(lambda: windows() > during + 20)
        stop.touch()
        for process, log in ((producer, "p.log"), (consumer, "c.log")):
            assert process.wait(60) == 0, (tmp_path / log).read_text()

    ids, totals = peer.trained(taken)
    expected = totals_of(make_refs(len(ids)))
    assert ids == names(len(ids))
    assert totals == (expected.refs, expected.bytes)
    print(f"server at the {server_at}'s host: {len(ids)} references, {at_cut} windows before the cut")
