"""Two hosts without a shared mount: two network namespaces, a Redis server in one of them, a link that is cut.

Each side also has a pid and a host name space of its own, so that neither can see the other's processes: liveness is
judged by heartbeats, as between real hosts.
"""

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.integration.channel import peer
from tests.unit.channel.kit import make_refs, names, totals_of, wait_for

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(240)]

CUT_S = 10.0
ROOT = Path(__file__).resolve().parents[3]
HOSTS = {"producer": "10.99.77.1", "consumer": "10.99.77.2"}


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=20)


def namespaces_work() -> str | None:
    """Return why network namespaces cannot be used here; None if they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if not shutil.which("ip") or not shutil.which("unshare"):
        return "needs ip and unshare (apt-get install iproute2 util-linux)"
    probe = subprocess.run(["ip", "netns", "add", "draftline-probe"], capture_output=True, text=True, check=False)
    if probe.returncode:
        return f"this kernel or container has no network namespaces: {probe.stderr.strip()}"
    ip("netns", "del", "draftline-probe")
    return None


@pytest.fixture
def two_hosts() -> Iterator[dict[str, str]]:
    """Two namespaces joined by one link; yields the namespace of each side."""
    why_not = namespaces_work()
    if why_not:
        pytest.skip(why_not)
    spaces = {side: f"dl-{side}-{os.getpid()}" for side in HOSTS}
    links = {side: f"dl{side[0]}{os.getpid()}" for side in HOSTS}
    with ExitStack() as cleanup:
        for space in spaces.values():
            ip("netns", "add", space)
            cleanup.callback(ip, "netns", "del", space)
        ip("link", "add", links["producer"], "type", "veth", "peer", "name", links["consumer"])
        for side, space in spaces.items():
            ip("link", "set", links[side], "netns", space)
            ip("-n", space, "link", "set", links[side], "name", "link0")
            ip("-n", space, "addr", "add", f"{HOSTS[side]}/24", "dev", "link0")
            ip("-n", space, "link", "set", "link0", "up")
            ip("-n", space, "link", "set", "lo", "up")
        yield spaces


def started(cleanup: ExitStack, space: str, command: list[str], log: Path) -> subprocess.Popen[bytes]:
    """Start a command in a namespace, with its own host name and processes; it is stopped with the test."""
    inside = ["ip", "netns", "exec", space, "unshare", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
    named = ["sh", "-c", f'hostname {space} && exec "$@"', "sh", *command]
    with log.open("wb") as output:
        process = subprocess.Popen([*inside, *named], cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)

    def stop() -> None:
        if process.poll() is None:
            process.kill()  # unshare waits with the polite signals blocked; what it started goes with it
            process.wait(20)

    cleanup.callback(stop)
    return process


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
        wait_for(lambda: all(reachable(space, HOSTS[server_at], port) for space in two_hosts.values()), 20)
        module = [sys.executable, "-m", "tests.integration.channel.peer"]
        producer = started(cleanup, two_hosts["producer"], [*module, "produce", url, str(stop)], tmp_path / "p.log")
        consumer = started(cleanup, two_hosts["consumer"], [*module, "consume", url, str(taken)], tmp_path / "c.log")

        def windows() -> int:
            return taken.read_text().count("window")

        wait_for(lambda: windows() > 20, 60)
        ip("-n", two_hosts["consumer"], "link", "set", "link0", "down")
        began = time.monotonic()
        threading.Event().wait(1.0)
        at_cut = windows()
        threading.Event().wait(CUT_S - (time.monotonic() - began))
        assert windows() <= at_cut + 64 // peer.WINDOW + 1, "the link was not cut"
        during = windows()
        ip("-n", two_hosts["consumer"], "link", "set", "link0", "up")
        wait_for(lambda: windows() > during + 20, 60)
        stop.touch()
        for process, log in ((producer, "p.log"), (consumer, "c.log")):
            assert process.wait(60) == 0, (tmp_path / log).read_text()

    ids, totals = peer.trained(taken)
    expected = totals_of(make_refs(len(ids)))
    assert ids == names(len(ids))
    assert totals == (expected.refs, expected.bytes)
    print(f"server at the {server_at}'s host: {len(ids)} references, {at_cut} windows before the cut")
