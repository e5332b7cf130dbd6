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

from disagg_core.errors import PortTaken
from disagg_core.processes import launch


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
    """End `process` and everything in its session's process group; return its exit code.

    Sends `first`, also to a process that is paused, waits up to `grace_s` seconds, then kills the whole group.
    """
    if process.poll() is None:
        process.send_signal(first)
        process.send_signal(signal.SIGCONT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace_s)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return process.wait()


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
