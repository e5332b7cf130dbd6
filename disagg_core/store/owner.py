"""The owner process: mounts memory into the store, faults it in, and holds it until it is told to stop.

``python -m disagg_core.store.owner --master HOST:PORT --capacity 64GiB [--host ADDRESS]`` on every storage node. Only
owners hold sample memory, so a producer or a trainer can die without taking samples along. First-touch page faults
make puts several times slower, so all memory is faulted in before the owner calls itself ready.
"""

from __future__ import annotations

import argparse
import json
import logging
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from disagg_core.errors import DraftlineError, StoreUnavailable
from disagg_core.files import write_atomically
from disagg_core.run_spec.section import parse_bytes
from disagg_core.store.capacity import check_capacity
from disagg_core.store.library import load_mooncake
from disagg_core.store.master import wait_for_port
from disagg_core.store.pages import populate, prefer_huge_pages

log = logging.getLogger(__name__)

LOCAL_BUFFER_BYTES = 16 << 20
STEP = 64 << 20
SMALLEST_MAPPING = 32 << 20
REPORT_EVERY_S = 1.0


class OwnerStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What an owner says about itself in its status file; bytes faulted in, of all it mounts."""

    state: str
    faulted_bytes: int = 0
    total_bytes: int = 0
    error: str = ""


def read_status(path: Path) -> OwnerStatus | None:
    """Return what the owner last said in `path`, None before its first word."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=OwnerStatus)
    except FileNotFoundError:
        return None


def main(argv: list[str] | None = None) -> int:
    """Own memory until SIGTERM or SIGINT; return the exit status."""
    options = _options(argv)
    logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(asctime)s %(levelname)s %(message)s")
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())

    def report(status: OwnerStatus) -> None:
        log.info(
            "%s: %d of %d bytes faulted in %s", status.state, status.faulted_bytes, status.total_bytes, status.error
        )
        if options.status is not None:
            write_atomically(options.status, json.dumps(msgspec.to_builtins(status)))

    try:
        check_capacity(options.capacity)
        _own(options.master, options.capacity, options.host, options.protocol, stop, report)
    except DraftlineError as error:
        report(OwnerStatus(state="failed", error=str(error)))
        return 1
    return 0


def _own(
    master: str,
    capacity: int,
    host: str,
    protocol: str,
    stop: threading.Event,
    report: Callable[[OwnerStatus], None],
) -> None:
    mooncake = load_mooncake()
    wait_for_port(master, 10.0, "--master")
    before = writable_mappings()
    client = mooncake.MooncakeDistributedStore()
    code = client.setup(host, "P2PHANDSHAKE", capacity, LOCAL_BUFFER_BYTES, protocol, "", master)
    if code:
        raise StoreUnavailable(f"Mooncake could not mount {capacity} bytes at {master} from {host}: code {code}")
    fault_in(added(before, writable_mappings()), stop, report)
    if not stop.is_set():
        report(OwnerStatus(state="ready", faulted_bytes=capacity, total_bytes=capacity))
    stop.wait()
    client.close()
    log.info("stopped")


def writable_mappings() -> list[tuple[int, int]]:
    """Return begin and end of this process's writable memory, in order of address."""
    mappings = []
    with Path("/proc/self/maps").open() as lines:
        for line in lines:
            span, permissions = line.split()[:2]
            if permissions.startswith("rw"):
                begin, _, end = span.partition("-")
                mappings.append((int(begin, 16), int(end, 16)))
    return mappings


def added(before: list[tuple[int, int]], after: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the spans of `after` that are not in `before`, without those too small to be sample memory."""
    spans = []
    for begin, end in after:
        for old_begin, old_end in before:
            if old_begin < end and begin < old_end:
                if old_begin > begin:
                    spans.append((begin, old_begin))
                begin = max(begin, old_end)
        if begin < end:
            spans.append((begin, end))
    return [(begin, end) for begin, end in spans if end - begin >= SMALLEST_MAPPING]


def fault_in(spans: list[tuple[int, int]], stop: threading.Event, report: Callable[[OwnerStatus], None]) -> None:
    """Give every page of `spans` its memory now, saying how far it is when that takes long."""
    total = sum(end - begin for begin, end in spans)
    done, said = 0, time.monotonic()
    for begin, end in spans:
        prefer_huge_pages(begin, end - begin)
        for at in range(begin, end, STEP):
            if stop.is_set():
                return
            size = min(STEP, end - at)
            if errno := populate(at, size):
                log.warning("memory is not faulted in ahead (errno %d): the first puts will be slow", errno)
                return
            done += size
            if time.monotonic() - said >= REPORT_EVERY_S:
                said = time.monotonic()
                report(OwnerStatus(state="faulting", faulted_bytes=done, total_bytes=total))


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m disagg_core.store.owner", description=__doc__)
    parser.add_argument("--master", required=True, help="host:port of the Mooncake master")
    parser.add_argument("--capacity", required=True, type=_bytes, help="memory to mount: bytes, or 64GiB")
    parser.add_argument("--host", default="127.0.0.1", help="address of this machine that the roles can reach")
    parser.add_argument("--protocol", default="tcp", choices=("tcp", "rdma"), help="transport of sample data")
    parser.add_argument("--status", type=Path, help="file to keep the owner's status in")
    return parser.parse_args(argv)


def _bytes(text: str) -> int:
    parsed = parse_bytes(text)
    assert isinstance(parsed, int)
    return parsed


if __name__ == "__main__":
    sys.exit(main())
