"""The services of others that a run needs, asked before it starts: channel, store, registry, SGLang servers."""

from __future__ import annotations

from disagg_core.channel.redis.address import check_server
from disagg_core.engines.servers.contract import ServerFailure
from disagg_core.engines.servers.probe import identity_differences, probe_ids
from disagg_core.engines.sglang.client import SglangClient
from disagg_core.errors import BadInput, ChannelUnavailable, StoreUnavailable, TargetError
from disagg_core.registry.references import registry_url
from disagg_core.run.plan import RunPlan
from disagg_core.run_spec.document import RunSpec
from disagg_core.settings import Settings
from disagg_core.storage.place import StorageUnusable, probe_place
from disagg_core.store import probe_store
from disagg_core.store.endpoints import StoreEndpoints

_ANSWER_S = 30.0


def check_channel(spec: RunSpec, settings: Settings) -> None:
    """Check that the channel's server answers this machine.

    Raises:
        BadInput: it refuses us or does not answer.
    """
    url = spec.channel.url
    if url is None:
        return
    try:
        check_server(url, password=settings.redis_password, ca=settings.redis_ca if url.startswith("rediss:") else None)
    except ChannelUnavailable as error:
        raise BadInput(f"channel.url: {error}") from error


def check_external_store(spec: RunSpec) -> None:
    """Check that a store of others answers and has the memory that the run counts on.

    Raises:
        BadInput: it does not.
    """
    if spec.store.mode != "external":
        return
    endpoints = StoreEndpoints(
        master_address=spec.store.master_address or "", metrics_address=spec.store.metrics_address or ""
    )
    try:
        probe_store(endpoints, spec.store.capacity)
    except StoreUnavailable as error:
        raise BadInput(f"store.master_address: {error}") from error


def check_registry(spec: RunSpec, settings: Settings, timeout_s: float = _ANSWER_S) -> str | None:
    """Check that a version can be written where the run publishes its draft, and a promotion be made by one only.

    Returns where that is; None for a run that publishes nothing, which is not asked.

    Raises:
        BadInput: it cannot.
    """
    if not spec.published:
        return None
    url = registry_url(spec.registry, settings)
    try:
        probe_place(url, timeout_s, exclusive=True)
    except StorageUnusable as error:
        raise BadInput(f"registry.url: {error}") from error
    return url


def check_servers(plan: RunPlan) -> None:
    """Ask every server of `target.server_urls` who it is; its states are compared later, by the producer.

    Raises:
        TargetError: one does not answer or is not the run's target; each is named with all that differs.
    """
    faults = [fault for url in plan.spec.target.server_urls for fault in _server_faults(url, plan)]
    if faults:
        raise TargetError(f"target.server_urls: {'; '.join(faults)}")


def _server_faults(url: str, plan: RunPlan) -> list[str]:
    client = SglangClient(url, url, timeout_s=_ANSWER_S)
    try:
        facts = client.probe(probe_ids(plan.target)).facts
    except (ServerFailure, TargetError) as error:
        return [str(error)]
    finally:
        client.close()
    differences = identity_differences(
        facts, plan.spec.target, plan.target, plan.capture, max_tokens=plan.spec.data.max_tokens
    )
    return [f"{url} is not the run's target: {', '.join(differences)}"] if differences else []
