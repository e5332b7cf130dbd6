"""What a run takes of the machine while it runs, and what of it is still there afterwards."""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from disagg_core.processes.tree import lives
from tests.chaos.platform import ChaosPlatform
from tests.kit.processes import command_of, environment_of

_SHARED = re.compile(r"(/dev/shm/\S+)")


@dataclass
class Footprint:
    """The processes, ports and shared memory in which a run was seen; looked at from time to time while it runs."""

    platform: ChaosPlatform
    _before: set[Path] = field(init=False)
    _processes: set[psutil.Process] = field(default_factory=set)
    _ports: set[int] = field(default_factory=set)
    _shared: set[Path] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._before = set(self._temporary())

    def processes(self) -> list[psutil.Process]:
        """Return what runs now below the flow runs of the platform."""
        return [found for found in self.platform.processes() if "PREFECT__FLOW_RUN_ID" in environment_of(found)]

    def look(self) -> None:
        """Take note of what is there now."""
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied, FileNotFoundError):
                self._processes.add(process)
                self._ports |= {c.laddr.port for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
                maps = Path(f"/proc/{process.pid}/maps").read_text()
                self._shared |= {Path(name) for name in _SHARED.findall(maps)}

    def left(self) -> dict[str, list[str]]:
        """Return by kind what is there of it now; empty lists where nothing is."""
        listening = {c.laddr.port for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
        return {
            "processes": [f"{process.pid} {command_of(process)[:120]}" for process in self._left_processes()],
            "ports": [str(port) for port in sorted(self._ports & listening)],
            "shared memory": [str(path) for path in sorted(self._shared) if path.exists()],
            "temporary files": [str(path) for path in sorted(set(self._temporary()) - self._before)],
        }

    def _left_processes(self) -> set[psutil.Process]:
        return set(self.processes()) | {process for process in self._processes if lives(process)}

    def _temporary(self) -> list[Path]:
        """Return temporary files; empty folders there are the workers', and the libraries' caches."""
        in_tmpdir = (path for path in self.platform.temporary.rglob("*") if not path.is_dir())
        return [*in_tmpdir, *(self.platform.home / "runs").rglob("*.tmp")]
