"""Starting, watching and stopping the store's processes: one master, one or more owners.

Each process has its own session and its own log file, inherits no stdout, and is killed by the kernel when we die. The
kernel ties that to the *thread* that started it, so all are started by one thread that lives as long as they do.
Everything binds to loopback unless told otherwise; Mooncake has no authentication.
"""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import ParamSpec

from disagg_core.errors import BadInput, PortTaken, StoreKilled, StoreTooLarge, StoreUnavailable
from disagg_core.processes.memory_kills import MemoryKills
from disagg_core.processes.retry import wait_until
from disagg_core.processes.shutdown import STORE_SERVICE_S
from disagg_core.processes.tree import check_port, describe_exit, free_ports, host_port, spawn, stop_tree, tail
from disagg_core.store.capacity import check_capacity
from disagg_core.store.endpoints import StoreEndpoints
from disagg_core.store.library import master_binary, require_mooncake
from disagg_core.store.master import MasterView, StoreHealth, wait_for_port
from disagg_core.store.owner import REPORT_EVERY_S, OwnerStatus, read_status

log = logging.getLogger(__name__)

MASTER_READY_S = 20.0
OWNER_READY_S = 60.0
SLOWEST_FAULTING = 100 << 20
"""Bytes a second; sets how long an owner may take to get ready."""
POLL_S = 0.02
PORT_TRIES = 5
SEGMENT_UNIT = 16 << 20
CLIENT_TTL_S = 60
"""A client or owner that is silent for so long is taken for dead by the master."""

P = ParamSpec("P")


@dataclass(frozen=True)
class ServiceProcess:
    """A process of ours and where it writes."""

    name: str
    process: subprocess.Popen[bytes]
    log_file: Path

    def require_alive(self, memory: MemoryKills | None = None) -> None:
        """Raise with the end of its log if the process has ended; `memory` knows of the kernel's kills.

        Raises:
            StoreKilled: the kernel has killed it for memory.
            StoreUnavailable: it has ended in another way.
        """
        code = self.process.poll()
        if code is None:
            return
        end = f"{self.name} (pid {self.process.pid}) ended with {describe_exit(code)}"
        if code == -signal.SIGKILL and memory is not None and (killed := memory.recent()) is not None:
            raise StoreKilled(f"{end}: {killed}; lower store.capacity, or raise the limit")
        raise StoreUnavailable(f"{end}; the end of {self.log_file}:\n" + tail(self.log_file, 8))

    def stop(self) -> None:
        """End the process: SIGTERM, then SIGKILL to its group."""
        running = self.process.poll() is None
        if stop_tree(self.process, grace_s=STORE_SERVICE_S) == -signal.SIGKILL and running:
            log.warning("%s (pid %d) did not end in %g s and was killed", self.name, self.process.pid, STORE_SERVICE_S)


@dataclass(frozen=True)
class StoreServices:
    """A running store of ours."""

    endpoints: StoreEndpoints
    capacity: int
    master: ServiceProcess
    owners: tuple[ServiceProcess, ...]
    memory: MemoryKills = field(default_factory=MemoryKills)

    def require_alive(self) -> None:
        """Raise as `ServiceProcess.require_alive` does if the master or an owner has ended; call it every few seconds.

        Raises:
            StoreKilled, StoreUnavailable: it has.
        """
        for service in (self.master, *self.owners):
            service.require_alive(self.memory)
        self.memory.look()


class Spawner:
    """The one thread that starts processes, so that they die with this process and not with some worker thread."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="store-spawner")

    def start(self, name: str, command: Sequence[str], log_file: Path) -> ServiceProcess:
        """Start `command` with its output in `log_file`."""
        return self._thread.submit(self._start, name, command, log_file).result()

    def _start(self, name: str, command: Sequence[str], log_file: Path) -> ServiceProcess:
        process = spawn(command, log_file, death_signal=signal.SIGKILL)
        return ServiceProcess(name, process, log_file)

    def close(self) -> None:
        """End the thread; the kernel kills what it started and is still running."""
        self._thread.shutdown()


@contextmanager
def running_store(
    capacity: int,
    *,
    host: str = "127.0.0.1",
    log_dir: Path,
    protocol: str = "tcp",
    master_port: int | None = None,
    metrics_port: int | None = None,
    owners: int = 1,
    client_ttl_s: int = CLIENT_TTL_S,
    progress: Callable[[str], None] = log.info,
) -> Iterator[StoreServices]:
    """Run a store for the duration of a ``with`` block; nothing of it is left afterwards, however the block ends.

    Args:
        capacity: bytes of sample memory, over all owners.
        host: address to bind to and to be reached at.
        log_dir: where ``mooncake-master.log`` and ``mooncake-owner-<n>.log`` go.
        protocol: ``tcp`` or ``rdma``.
        master_port: port of the master; by default a free one.
        metrics_port: port of its metrics; by default a free one.
        owners: owner processes to share the capacity.
        client_ttl_s: silence after which the master takes a client for dead.
        progress: told how far the owners are with faulting in their memory, about once a second.

    Raises:
        MissingLibrary: Mooncake cannot be loaded.
        StoreTooLarge: the capacity does not fit this machine.
        PortTaken: a port that was asked for is in use.
        StoreKilled: the kernel killed a process for memory while the owners faulted theirs in.
        StoreUnavailable: a process ended or did not get ready in time; the end of its log is in the message.
    """
    require_mooncake()
    check_capacity(capacity)
    if owners < 1:
        raise BadInput(f"owners: expected 1 or more, found {owners}")
    if host in ("", "0.0.0.0", "::"):
        raise BadInput(f"host: expected the address that the roles reach this machine at, found {host!r}")
    log_dir.mkdir(parents=True, exist_ok=True)
    with ExitStack() as teardown:
        spawner = Spawner()
        teardown.callback(spawner.close)
        master, endpoints = _start_master(spawner, host, master_port, metrics_port, client_ttl_s, log_dir, teardown)
        share = -(-capacity // owners // SEGMENT_UNIT) * SEGMENT_UNIT
        started = []
        for index in range(owners):
            status = log_dir / f"mooncake-owner-{index}.status.json"
            status.unlink(missing_ok=True)
            command = _owner_command(endpoints.master_address, share, host, protocol, status)
            owner = spawner.start(f"store owner {index}", command, log_dir / f"mooncake-owner-{index}.log")
            teardown.callback(owner.stop)
            started.append((owner, status))
        services = StoreServices(endpoints, capacity, master, tuple(owner for owner, _ in started))
        _wait_for_owners(services, [status for _, status in started], share, progress)
        yield services


def _for_clients(
    run: Callable[P, AbstractContextManager[StoreServices]],
) -> Callable[P, AbstractContextManager[StoreEndpoints]]:
    @contextmanager
    def for_clients(*args: P.args, **kwargs: P.kwargs) -> Iterator[StoreEndpoints]:
        with run(*args, **kwargs) as services:
            yield services.endpoints

    return for_clients


managed_store = _for_clients(running_store)
"""`running_store` for those who only need to know where it is."""


def probe_store(endpoints: StoreEndpoints, min_capacity: int = 0, *, timeout_s: float = 5.0) -> StoreHealth:
    """Check that a store is there, serves, and is large enough; return its usage.

    Mooncake's master (0.3.13) does not publish its version; a client whose version does not fit fails at its set-up.

    Raises:
        StoreUnavailable: the master or its metrics cannot be reached, or it does not serve, or it has no owner.
        StoreTooLarge: it has less memory than `min_capacity`.
    """
    wait_for_port(endpoints.master_address, timeout_s, "master_address")
    master = MasterView(endpoints)
    health = master.health()
    if not master.is_ready():
        raise StoreUnavailable(f"the master at {endpoints.master_address} answers but does not serve; see its log")
    if health.total_bytes == 0:
        raise StoreUnavailable(
            f"the master at {endpoints.master_address} has no owner: expected mounted memory, found none; start "
            f"python -m disagg_core.store.owner --master {endpoints.master_address} --capacity <bytes>"
        )
    if health.total_bytes < min_capacity:
        raise StoreTooLarge(
            f"the store at {endpoints.master_address} has {health.total_bytes} bytes, {min_capacity} are asked for; "
            "set store.capacity to what it has, or start more owners"
        )
    return health


def _start_master(
    spawner: Spawner,
    host: str,
    rpc_port: int | None,
    metrics_port: int | None,
    client_ttl_s: int,
    log_dir: Path,
    teardown: ExitStack,
) -> tuple[ServiceProcess, StoreEndpoints]:
    """Start a master on the ports given or on free ones; another process may take a free one first, so try again."""
    for port in (rpc_port, metrics_port):
        if port is not None:
            check_port(host, port, "mooncake_master")
    log_file = log_dir / "mooncake-master.log"
    for _ in range(PORT_TRIES):
        free = free_ports(host, 2)
        ports = rpc_port or free[0], metrics_port or free[1]
        endpoints = StoreEndpoints(master_address=host_port(host, ports[0]), metrics_address=host_port(host, ports[1]))
        written = log_file.stat().st_size if log_file.exists() else 0
        master = spawner.start("mooncake_master", _master_command(host, *ports, client_ttl_s), log_file)
        with ExitStack() as undo:
            undo.callback(master.stop)
            if _becomes_ready(master, endpoints):
                undo.pop_all()
                teardown.callback(master.stop)
                return master, endpoints
        if "Address already in use" not in log_file.read_bytes()[written:].decode(errors="replace"):
            break
        if rpc_port is not None and metrics_port is not None:
            raise PortTaken(f"port {rpc_port} or {metrics_port} of {host} was taken by another process; choose others")
    master.require_alive()
    raise StoreUnavailable(f"mooncake_master did not get ready in {MASTER_READY_S:g} s; see {log_file}")


def _becomes_ready(master: ServiceProcess, endpoints: StoreEndpoints) -> bool:
    view = MasterView(endpoints)
    wait_until(lambda: view.is_ready() or master.process.poll() is not None, timeout_s=MASTER_READY_S, every_s=POLL_S)
    time.sleep(POLL_S)  # a master that lost the race for its other port ends right after it was ready
    return view.is_ready() and master.process.poll() is None


def _wait_for_owners(
    services: StoreServices, files: Sequence[Path], share: int, progress: Callable[[str], None]
) -> None:
    view, total = MasterView(services.endpoints), share * len(files)
    said = time.monotonic()

    def ready() -> bool:
        nonlocal said
        statuses = [read_status(file) for file in files]
        for status, owner in zip(statuses, services.owners, strict=True):
            if status is not None and status.state == "failed":
                raise StoreUnavailable(f"{owner.name} failed: {status.error}; see {owner.log_file}")
        services.require_alive()
        if all(status is not None and status.state == "ready" for status in statuses):
            return view.health().total_bytes >= services.capacity
        if time.monotonic() - said >= REPORT_EVERY_S:
            said = time.monotonic()
            progress(_how_far(statuses, total))
        return False

    timeout_s = OWNER_READY_S + total / SLOWEST_FAULTING
    if not wait_until(ready, timeout_s=timeout_s, every_s=POLL_S):
        far = _how_far([read_status(file) for file in files], total)
        raise StoreUnavailable(f"the store's owners did not get ready in {timeout_s:.0f} s: {far}")


def _how_far(statuses: Sequence[OwnerStatus | None], total: int) -> str:
    done = sum(status.faulted_bytes for status in statuses if status is not None)
    return f"the store's owners have faulted in {done / 2**30:.1f} of {total / 2**30:.1f} GiB"


def _master_command(host: str, rpc_port: int, metrics_port: int, client_ttl_s: int) -> list[str]:
    return [
        str(master_binary()),
        f"-rpc_address={host}",
        f"-rpc_port={rpc_port}",
        f"-metrics_host={host}",
        f"-metrics_port={metrics_port}",
        "-default_kv_lease_ttl=60s",
        f"-client_ttl={client_ttl_s}",
        "-put_start_discard_timeout_sec=30",
        "-put_start_release_timeout_sec=60",
        "-eviction_high_watermark_ratio=1.0",  # otherwise a full store makes it look for victims 100 times a second
        "-enable_metric_reporting=false",  # no periodic dump into the log; /metrics stays
    ]


def _owner_command(master_address: str, capacity: int, host: str, protocol: str, status: Path) -> list[str]:
    return [
        sys.executable, "-m", "disagg_core.store.owner",
        "--master", master_address,
        "--capacity", str(capacity),
        "--host", host,
        "--protocol", protocol,
        "--status", str(status),
    ]  # fmt: skip
