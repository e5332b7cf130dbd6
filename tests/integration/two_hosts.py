"""Two hosts on one machine: two network namespaces with one link, and with processes and host names of their own."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
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
        pytest.fail(f"two hosts are two network namespaces: {why_not}")
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


def started(
    cleanup: ExitStack, space: str, command: list[str], log: Path, environment: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Start a command in a namespace, with its own host name and processes; it is stopped with the test.

    `environment` is added to ours.
    """
    inside = ["ip", "netns", "exec", space, "unshare", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
    named = ["sh", "-c", f'hostname {space} && exec "$@"', "sh", *command]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*inside, *named],
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
        )

    def stop() -> None:
        if process.poll() is None:
            process.kill()  # unshare waits with the polite signals blocked; what it started goes with it
            process.wait(20)

    cleanup.callback(stop)
    return process
