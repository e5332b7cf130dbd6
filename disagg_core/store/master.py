"""What the master tells over HTTP: readiness, metrics, keys and segments. Loads neither Mooncake nor torch."""

from __future__ import annotations

import json
import re
import socket
from collections import Counter

import httpx
import msgspec

from disagg_core.errors import BadInput, StoreUnavailable
from disagg_core.processes.retry import Retry
from disagg_core.processes.tree import host_port
from disagg_core.store.endpoints import StoreEndpoints

_METRIC = re.compile(r"^(master_\w+) (\S+)$", re.MULTILINE)
HTTP_TIMEOUT_S = 5.0
MASTER_POLL_S = 0.05
"""Pause between two checks that a master which is starting answers."""


class StoreHealth(msgspec.Struct, frozen=True, kw_only=True):
    """The store as its master sees it. `evicted` above 0 is an alarm: we never allow an eviction."""

    used_bytes: int
    total_bytes: int
    keys: int
    evicted: int


class Segment(msgspec.Struct, frozen=True, kw_only=True):
    """The memory of one owner."""

    name: str
    size_bytes: int
    used_bytes: int
    status: str


class _Segment(msgspec.Struct):
    segment_name: str
    size_bytes: int
    allocator_used_bytes: int
    status: str


class _Segments(msgspec.Struct):
    segments: list[_Segment]


def split_address(address: str, what: str) -> tuple[str, int]:
    """Return host and port of ``host:port`` (``[::1]:port`` too).

    Raises:
        BadInput: `address`, named `what` in the message, is not of that form.
    """
    host, colon, port = address.rpartition(":")
    if not (colon and host and port.isdigit() and 0 < int(port) < 65536):
        raise BadInput(f"{what}: expected host:port, found {address!r}")
    return host.strip("[]"), int(port)


def wait_for_port(address: str, timeout_s: float, what: str) -> None:
    """Return once something listens at `address`.

    Raises:
        StoreUnavailable: nothing did for `timeout_s` seconds.
    """
    host, port = split_address(address, what)
    connect = Retry(OSError, budget_s=timeout_s, every_s=MASTER_POLL_S)
    try:
        connect(socket.create_connection, (host, port), timeout=1.0).close()
    except OSError as error:
        raise StoreUnavailable(
            f"{what}: expected a Mooncake master listening at {address}, found none in {timeout_s:g} s ({error}); "
            "start it, or correct the address"
        ) from error


class MasterView:
    """Reads of one master's HTTP endpoint."""

    def __init__(self, endpoints: StoreEndpoints) -> None:
        self.endpoints = endpoints
        host, port = split_address(endpoints.metrics_address, "metrics_address")
        # Without kept connections there is nothing to close, and nothing that a forked child would share.
        self._http = httpx.Client(
            base_url=f"http://{host_port(host, port)}",
            timeout=HTTP_TIMEOUT_S,
            limits=httpx.Limits(max_keepalive_connections=0),
            trust_env=False,
            verify=False,  # plain HTTP: loading the certificates would take 50 ms
        )

    def is_ready(self) -> bool:
        """Tell whether the master serves requests; False when it cannot be reached."""
        try:
            answer = json.loads(self._get("/health"))
        except (StoreUnavailable, json.JSONDecodeError):
            return False
        return isinstance(answer, dict) and answer.get("service_ready") is True

    def health(self) -> StoreHealth:
        """Return usage from the master's metrics.

        Raises:
            StoreUnavailable: the master does not answer, or what answers is not a Mooncake master.
        """
        metrics = {name: float(value) for name, value in _METRIC.findall(self._get("/metrics"))}
        try:
            return StoreHealth(
                used_bytes=int(metrics["master_allocated_bytes"]),
                total_bytes=int(metrics["master_total_capacity_bytes"]),
                keys=int(metrics["master_key_count"]),
                evicted=int(metrics["master_evicted_key_count"]),
            )
        except KeyError as error:
            raise StoreUnavailable(
                f"expected the metrics of a Mooncake master at {self.endpoints.metrics_address}, found none named "
                f"{error}; is metrics_address the master's metrics port?"
            ) from error

    def keys(self, prefix: str = "") -> list[str]:
        """Return the keys that begin with `prefix`, in no order."""
        return [key for key in self._get("/get_all_keys").splitlines() if key.startswith(prefix)]

    def keys_by_run(self) -> dict[str, int]:
        """Return how many keys each ``run/attempt`` has; keys that are not ours are counted under their first part."""
        return dict(Counter("/".join(key.split("/")[:-2]) or key.split("/")[0] for key in self.keys()))

    def segments(self) -> list[Segment]:
        """Return the owners' segments.

        Raises:
            StoreUnavailable: the master does not answer, or what answers is not a Mooncake master.
        """
        try:
            found = msgspec.json.decode(self._get("/get_segments_detail"), type=_Segments, strict=False).segments
        except msgspec.MsgspecError as error:
            raise StoreUnavailable(
                f"expected the segments of a Mooncake master at {self.endpoints.metrics_address}, found something else "
                f"({error}); is metrics_address the master's metrics port?"
            ) from error
        return [
            Segment(
                name=segment.segment_name,
                size_bytes=segment.size_bytes,
                used_bytes=segment.allocator_used_bytes,
                status=segment.status,
            )
            for segment in found
        ]

    def _get(self, path: str) -> str:
        try:
            response = self._http.get(path)
            body = response.content.decode()
        except (httpx.HTTPError, UnicodeDecodeError) as error:
            raise StoreUnavailable(
                f"the master's metrics at {self.endpoints.metrics_address} cannot be read ({path}: {error}); "
                "is the master running, and is this its metrics port?"
            ) from error
        if response.status_code != httpx.codes.OK:
            raise StoreUnavailable(
                f"the master's metrics at {self.endpoints.metrics_address} answered {path} with "
                f"{response.status_code} {response.reason_phrase}; is this a Mooncake master's metrics port?"
            )
        return body
