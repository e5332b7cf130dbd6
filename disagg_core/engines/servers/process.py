"""A server that we start ourselves, whatever engine it runs: the process, its end, and starting it again.

A server runs in its engine's environment (another Python than ours), in its own process group with its own log file,
and is killed by the kernel when we die.
"""

from __future__ import annotations

import getpass
import logging
import os
import signal
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import Protocol

from disagg_core.processes.scratch import Scratch
from disagg_core.processes.shared_memory import SharedMemory
from disagg_core.processes.shutdown import SERVER_S
from disagg_core.processes.tree import describe_exit, free_port, host_port, spawn, stop_tree, tail

logger = logging.getLogger(__name__)


class Launch(Protocol):
    """How the servers of an engine are started, but for a server's place among several (port, GPUs, log)."""

    @property
    def engine(self) -> str:
        """What its servers are called."""
        ...

    @property
    def host(self) -> str:
        """The address to bind to."""
        ...

    @property
    def gpus(self) -> int:
        """GPUs of one server."""
        ...

    def command(self, *, port: int, base_gpu: int) -> list[str]:
        """Return the command line of one server, whose GPUs are those from `base_gpu` on."""
        ...

    def environment(self) -> dict[str, str]:
        """Return the variables of a server's process besides ours."""
        ...


class ManagedServer:
    """One server process at a time, under one name; started again on demand. Safe across threads.

    Each start has a port of its own, chosen when it is needed: in the minutes in which a model loads, or while a server
    is down, somebody else may take one that was chosen before. `url` is that of the last start.
    """

    def __init__(self, launch: Launch, *, index: int, log_dir: Path) -> None:
        self._launch = launch
        self._index = index
        self.name = f"{launch.engine}-{index}"
        self.log = log_dir / f"{self.name}.log"
        self.port = 0
        self._memory = SharedMemory(log_dir / f"{self.name}.shared-memory")
        self._scratch = Scratch(log_dir / f"{self.name}.scratch", self.name)
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        """Where the server answers; nobody does before the first start."""
        host = self._launch.host
        return f"http://{host_port(host, self.port)}"

    @property
    def pid(self) -> int | None:
        """The process id of the running server, None before the first start."""
        process = self._process
        return None if process is None else process.pid

    def start(self) -> None:
        """Start the server; it is not ready yet. Call from a thread that lives as long as the server may."""
        environment = self._launch.environment()
        with self._lock:
            if self._closed:
                return
            self._free()  # of a server that died, or was killed together with an earlier process of ours
            environment |= {"TORCHINDUCTOR_CACHE_DIR": _compiled_code(), **self._scratch.make()}
            self.port = free_port(self._launch.host)
            command = self._launch.command(port=self.port, base_gpu=self._index * self._launch.gpus)
            logger.info("starting %s: %s", self.name, " ".join(command))
            self._process = spawn(command, self.log, environment=environment, death_signal=signal.SIGKILL)

    def became_healthy(self) -> None:
        """Take note of what the server holds and would leave behind if it was killed."""
        with self._lock:
            if self._process is not None:
                self._memory.note(self._process)

    def exit_reason(self) -> str | None:
        """Return how the server ended, with the end of its log; None while it runs."""
        process = self._process
        if process is None:
            return "not started"
        code = process.poll()
        if code is None:
            return None
        return f"{describe_exit(code)}; the end of {self.log}:\n{tail(self.log)}"

    def stop(self, *, at_once: bool = False) -> None:
        """End the server and all of its processes; `at_once` for one that hangs."""
        with self._lock:
            if self._process is not None:
                first = signal.SIGKILL if at_once else signal.SIGTERM
                self._memory.note(self._process)
                stop_tree(self._process, grace_s=SERVER_S, first=first)
                self._free()
                self._process = None

    def _free(self) -> None:
        """Remove what a server has left behind whose processes have all ended."""
        self._memory.free()
        self._scratch.remove()

    def close(self) -> None:
        """End the server for good: `start` does nothing from now on."""
        self._closed = True
        self.stop()


def _compiled_code() -> str:
    """Return where torch keeps what it compiles: as it would choose, were a server's temporary files not its own."""
    return os.environ.get("TORCHINDUCTOR_CACHE_DIR") or f"{tempfile.gettempdir()}/torchinductor_{getpass.getuser()}"
