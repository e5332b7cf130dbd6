"""What both roles open the same way from their assignment: the reference channel and the feature store."""

from __future__ import annotations

from disagg_core.channel import StreamingRefChannel
from disagg_core.contracts import RunIdentity
from disagg_core.run.plan import RoleAssignment
from disagg_core.settings import get_settings
from disagg_core.store import MooncakeFeatureStore


def open_channel(assignment: RoleAssignment) -> StreamingRefChannel:
    """Return the attempt's channel with this machine's secrets; nothing is claimed yet.

    Raises:
        ForeignChannel: it belongs to another attempt.
        ChannelUnavailable: its server or mount cannot be reached.
    """
    settings, url = get_settings(), assignment.channel_url
    return StreamingRefChannel(
        url,
        run_id=assignment.plan.run_id,
        attempt=assignment.attempt,
        idle_timeout_s=assignment.plan.spec.channel.idle_timeout_s,
        password=settings.redis_password,
        ca=settings.redis_ca if url.startswith("rediss:") else None,
    )


def open_store(assignment: RoleAssignment, expected: RunIdentity | None = None) -> MooncakeFeatureStore:
    """Return a client of the attempt's store; with `expected`, references of other identities are refused.

    Raises:
        StoreUnavailable: its master cannot be reached.
    """
    section = assignment.plan.spec.store
    return MooncakeFeatureStore(
        assignment.store,
        namespace=assignment.namespace,
        host=get_settings().host,
        protocol=section.protocol,
        checksum=section.checksum,
        put_timeout_s=section.put_timeout_s,
        staging_bytes=assignment.plan.staging_bytes,
        expected=expected,
    )
