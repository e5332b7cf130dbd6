"""Process trees that never outlive us: own session, own log file, and a bounded, escalating end.

A child is killed by the kernel when the thread that spawned it ends (``PR_SET_PDEATHSIG``), so spawn from a thread
that lives as long as the child may: usually the main thread. Children never inherit our standard output: a pipe held
open by a grandchild would hide our own death from whoever watches it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from disagg_core.errors import PortTaken
from disagg_core.processes import launch
from disagg_core.processes.retry import wait_until

_GONE_S = 5.0
"""How long the kernel may take to end what was killed; a process on a hung mount takes for ever."""


def spawn(
    command: Sequence[str],
    log: Path,
    *,
    environment: Mapping[str, str] | None = None,
    death_signal: signal.Signals = signal.SIGTERM,
) -> subprocess.Popen[bytes]:
    """Start `command` as the leader of its own session; its output is appended to `log`.

    `environment` is added to ours. The kernel sends `death_signal` to the child when we die.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-I", launch.__file__, str(os.getpid()), str(int(death_signal)), *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        )


def stop_tree(process: subprocess.Popen[bytes], *, grace_s: float, first: signal.Signals = signal.SIGTERM) -> int:
    """End `process`, which `spawn` started, and all that descends from it, whatever sessions; return its exit code.

    Sends `first`, also to a process that is paused, waits up to `grace_s` seconds for its end, then kills what is left
    of the tree. Of processes that belong to others, and so cannot be looked at, those that are orphans are not found.
    """
    descent = descendants(process)
    if process.poll() is None:
        process.send_signal(first)
        process.send_signal(signal.SIGCONT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace_s)
    descent |= descendants(process)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for left in descent:
        with contextlib.suppress(psutil.NoSuchProcess):
            left.kill()
    wait_until(lambda: not any(map(lives, descent)), timeout_s=_GONE_S, every_s=0.02)
    return process.wait()


def descendants(process: subprocess.Popen[bytes]) -> set[psutil.Process]:
    """Return what descends from `process`, which `spawn` started, also where the processes between have ended."""
    found: set[psutil.Process] = set()
    with contextlib.suppress(psutil.NoSuchProcess):
        found |= set(psutil.Process(process.pid).children(recursive=True))
    mark = launch.mark_of(os.getpid(), process.pid)
    for other in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if other.pid != process.pid and mark in other.environ().get(launch.TREES, ""):
                found.add(other)
    return found


def lives(process: psutil.Process) -> bool:
    """Tell whether `process` is there, and no zombie whose parent has not looked at it yet."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(process.is_running()) and process.status() != psutil.STATUS_ZOMBIE
    return False


def describe_exit(code: int) -> str:
    """Return ``exit code 1`` or ``killed by SIGKILL``."""
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def tail(log: Path, lines: int = 15) -> str:
    """Return the last `lines` lines of `log`; an empty string if there is none."""
    if not log.is_file():
        return ""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 64 * 1024))
        text = file.read().decode(errors="replace")
    return "\n".join(text.splitlines()[-lines:])


def free_port(host: str) -> int:
    """Return a TCP port that nothing listens on at `host` at this moment."""
    return free_ports(host, 1)[0]


def free_ports(host: str, count: int) -> list[int]:
    """Return `count` such ports, each another one."""
    with contextlib.ExitStack() as held:
        return [held.enter_context(_bound(host, 0)).getsockname()[1] for _ in range(count)]


def host_port(host: str, port: int) -> str:
    """Return ``host:port`` as URLs and addresses have it, an IPv6 `host` in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def check_port(host: str, port: int, purpose: str) -> None:
    """Raise `PortTaken` if `port` cannot be bound on `host`."""
    try:
        _bound(host, port).close()
    except OSError as error:
        raise PortTaken(
            f"{purpose}: port {port} on {host} is taken ({error.strerror}); stop what listens there "
            "or choose another port"
        ) from error


def _bound(host: str, port: int) -> socket.socket:
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except OSError:
        bound.close()
        raise
    return bound
