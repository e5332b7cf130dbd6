"""Looking for what calls for another draft."""

from __future__ import annotations

from dataclasses import dataclass

from prefect import task
from prefect.cache_policies import NO_CACHE

from disagg_core.run_spec.document import RunSpec
from disagg_core.settings import get_settings


@dataclass(frozen=True)
class Sighting:
    """An event that is to be emitted, of which target, and what was seen."""

    event: str
    target: str
    reason: str


@task(name="look", task_run_name="target, data and server", cache_policy=NO_CACHE)
def look(spec: RunSpec, server: str | None, drop: float) -> list[Sighting]:
    """Return what calls for another draft; see `disagg_core.recurring.watch`."""
    from disagg_core.recurring.watch import watch

    found = watch(spec, get_settings(), server, drop)
    return [Sighting(one.event, one.target, one.reason) for one in found]
