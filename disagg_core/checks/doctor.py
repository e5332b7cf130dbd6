"""The checks of `draftline doctor`: this machine, and SGLang servers before they are trusted with a run.

Every check gives findings and raises nothing for what it was made to find. A finding of level ``failed`` means that a
run would fail; ``warning`` that some runs would.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from disagg_core.contracts import Capture
from disagg_core.engines.servers.probe import (
    TOLERANCE,
    compare_states,
    identity_differences,
    probe_ids,
    reference_states,
)
from disagg_core.engines.servers.process import ManagedServer
from disagg_core.engines.sglang.client import SglangClient
from disagg_core.engines.sglang.launch import ServerLaunch, find_sglang_python
from disagg_core.errors import DraftlineError, TargetUnavailable
from disagg_core.processes.retry import wait_until
from disagg_core.processes.tree import check_port
from disagg_core.run_spec.document import TargetSection
from disagg_core.settings import Settings
from disagg_core.store.capacity import available_bytes
from disagg_core.target.facts import TargetFacts

Level = Literal["ok", "warning", "failed"]

_SMALL_DISK = 5 * 1024**3
_STORE_BYTES = 64 * 1024**2
_HEALTH_TIMEOUT_S = 30.0
_POLL_S = 0.5
_PROBE_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    level: Level
    what: str
    found: str


def machine_findings(settings: Settings) -> Iterator[Finding]:
    """Check Python, packages, GPUs, memory, disk, ports, the Mooncake library and the SGLang environment."""
    yield Finding("ok", "python", sys.version.split()[0])
    yield from _packages()
    yield _gpus()
    yield Finding("ok", "memory", f"{_gib(available_bytes())} of {_gib(psutil.virtual_memory().total)} available")
    yield from _tried("home", lambda: _home(settings.home))
    yield from _tried("address", lambda: _address(settings))
    if settings.prefect_port is not None:
        port = settings.prefect_port
        yield from _tried("prefect port", lambda: _port(settings.host, port), level="warning")
    yield from _tried("feature store", lambda: _store(settings))
    yield from _tried("sglang environment", lambda: str(find_sglang_python(settings)), level="warning")


def server_findings(
    client: SglangClient, section: TargetSection, facts: TargetFacts, capture: Capture
) -> Iterator[Finding]:
    """Probe one server: health, version, identity, capture, its layers against transformers' on a sample, memory."""
    if not client.healthy(_HEALTH_TIMEOUT_S):
        yield Finding(
            "failed", "health", f"{client.url} does not answer within {_HEALTH_TIMEOUT_S:g} s or is unhealthy"
        )
        return
    yield Finding("ok", "health", client.url)
    try:
        began = time.perf_counter()
        reply = client.probe(probe_ids(facts))
        spent = time.perf_counter() - began
    except DraftlineError as error:
        yield Finding("failed", "capture", str(error))
        return
    found = reply.facts
    yield Finding("ok", "version", f"sglang {found.sglang_version}, tensor parallel {found.tensor_parallel}")
    yield Finding("ok", "capture", f"layers {found.aux_layers} in {found.dtype}, {spent * 1000:.0f} ms for one probe")
    differences = identity_differences(found, section, facts, capture)
    for difference in differences:
        yield Finding("failed", "identity", difference)
    if differences:
        return
    yield Finding("ok", "identity", f"{found.model_path}, config and weights {found.fingerprint}")
    limit = TOLERANCE[facts.dtype]
    reference = reference_states(section, facts, capture, whole=True)
    for entry in compare_states(reply, facts, capture, reference):
        level: Level = "ok" if entry.relative <= limit else "failed"
        text = f"relative error {entry.relative:.2g} (limit {limit:g}), largest difference {entry.largest:.2g}"
        yield Finding(level, entry.name, text)
    yield from _tried("server memory", lambda: _server_memory(client))


@contextlib.contextmanager
def started_server(
    section: TargetSection, facts: TargetFacts, capture: Capture, settings: Settings, log_dir: Path
) -> Iterator[SglangClient]:
    """Start one server as a run would, wait until it is healthy, and stop it afterwards.

    Raises:
        DraftlineError: there is no SGLang environment.
        TargetUnavailable: the server ended, or was not healthy in time; the message holds the end of its log.
    """
    import torch

    cpu = section.device == "cpu" or not torch.cuda.is_available()
    launch = ServerLaunch(
        python=find_sglang_python(settings),
        section=section,
        facts=facts,
        capture=capture,
        longest=min(2048, facts.max_position_embeddings),
        cpu=cpu,
        host=settings.host,
    )
    server = ManagedServer(launch, index=0, log_dir=log_dir)
    server.start()
    client = SglangClient(server.name, server.url, timeout_s=_PROBE_TIMEOUT_S)
    try:
        timeout_s = section.unavailable_timeout_s

        def check_running() -> None:
            if (ended := server.exit_reason()) is not None:
                raise TargetUnavailable(f"the server did not start: {ended}")

        def healthy() -> bool:
            return client.healthy(_HEALTH_TIMEOUT_S)

        if not wait_until(healthy, timeout_s=timeout_s, every_s=_POLL_S, on_wait=check_running):
            raise TargetUnavailable(
                f"the server did not start: not healthy within {timeout_s:g} s; its log: {server.log}"
            )
        yield client
    finally:
        client.close()
        server.stop()


def _tried(what: str, check: Callable[[], str], level: Level = "failed") -> Iterator[Finding]:
    try:
        yield Finding("ok", what, check())
    except (DraftlineError, OSError, KeyError) as error:
        yield Finding(level, what, str(error))


def _packages() -> Iterator[Finding]:
    for name in ("torch", "transformers", "prefect"):
        try:
            yield Finding("ok", name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            yield Finding("failed", name, f"not installed in {sys.prefix}; install draftline with its dependencies")


def _gpus() -> Finding:
    import torch

    if not torch.cuda.is_available():
        return Finding("warning", "GPUs", "none that torch can use; runs here go to the CPU")
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    free = ", ".join(_gib(torch.cuda.mem_get_info(index)[0]) for index in range(len(names)))
    return Finding("ok", "GPUs", f"{len(names)}: {', '.join(sorted(set(names)))}; free: {free}")


def _home(home: Path) -> str:
    home.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=home):
        free = shutil.disk_usage(home).free
    if free < _SMALL_DISK:
        raise OSError(f"{home}: expected {_gib(_SMALL_DISK)} free for checkpoints and logs, found {_gib(free)}")
    return f"{home}, {_gib(free)} free"


def _address(settings: Settings) -> str:
    check_port(settings.host, 0, "DRAFTLINE_HOST")
    return f"servers bind to {settings.host}"


def _port(host: str, port: int) -> str:
    check_port(host, port, "DRAFTLINE_PREFECT_PORT")
    return f"{port} is free"


def _store(settings: Settings) -> str:
    """Take one sample through a real store: library, master, owner, put, get, removal."""
    from disagg_core.store import MooncakeFeatureStore, managed_store, require_mooncake, round_trip

    require_mooncake()
    with tempfile.TemporaryDirectory() as logs, contextlib.ExitStack() as stack:
        endpoints = stack.enter_context(managed_store(_STORE_BYTES, host=settings.host, log_dir=Path(logs)))
        store = stack.enter_context(MooncakeFeatureStore(endpoints, namespace="doctor/1", host=settings.host))
        spent = round_trip(store)
    version = importlib.metadata.version(_mooncake_distribution())
    return f"Mooncake {version}: one sample put, got and removed in {spent * 1000:.0f} ms"


def _mooncake_distribution() -> str:
    """Return the name of the installed Mooncake wheel: there is one for each CUDA version, and one for none."""
    return importlib.metadata.packages_distributions()["mooncake"][0]


def _server_memory(client: SglangClient) -> str:
    usage = client.memory()
    return ", ".join(f"{name} {value:g}" for name, value in usage.items()) + " (GiB, tokens)"


def _gib(size: float) -> str:
    return f"{size / 1024**3:.1f} GiB"
